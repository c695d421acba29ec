"""CLIP's image tower beside its formulas, and beside transformers' own where that is installed."""

import pytest
import torch

from internvl_ds.errors import ConfigError
from internvl_ds.train.model import build_model
from tests.train.models import formulas
from tests.train.models.tiny import difference, images, tiny_config, tiny_model


@pytest.mark.parametrize('target', ['cls_patch_concat', 'attention_pooling'])
def test_the_forward_pass_is_the_formulas(target):
    model = tiny_model('clip_vit', CLS_TARGET=target)
    state = {name: t.double() for name, t in model.state_dict().items()}
    want = formulas.clip_vit(state, images().double(), 4, target)
    with torch.no_grad():
        assert difference(model(images()), want) < 1e-6  # as in test_intern_vit.py
        with torch.autocast('cpu', torch.bfloat16):
            assert difference(model(images()), want) < 0.033
        half = model.bfloat16()(images().bfloat16())
    assert difference(half, want) < 0.033


def test_names_and_their_order_are_those_of_transformers():
    model = build_model(tiny_config('clip_vit', DEPTH=1))
    names = ['embeddings.class_embedding', 'embeddings.patch_embedding.weight']
    names += ['embeddings.position_embedding.weight']
    modules = ['pre_layrnorm']
    layer = [f'self_attn.{which}_proj' for which in ('k', 'v', 'q', 'out')]
    layer += ['layer_norm1', 'mlp.fc1', 'mlp.fc2', 'layer_norm2']
    modules += [f'encoder.layers.0.{name}' for name in layer] + ['post_layernorm']
    names += [f'{module}.{kind}' for module in modules for kind in ('weight', 'bias')]
    assert list(model.backbone_keys) == [f'model.{name}' for name in names]


def test_the_tower_is_transformers_own():
    transformers = pytest.importorskip('transformers')
    model = tiny_model('clip_vit')
    settings = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        image_size=28, patch_size=14,
    )  # fmt: skip
    theirs = transformers.CLIPVisionModel(settings).eval()
    tower = getattr(theirs, 'vision_model', theirs)
    tower.load_state_dict(formulas.part(model.state_dict(), 'model.'))
    with torch.no_grad():
        want = theirs(images()).last_hidden_state
        assert difference(model.forward_features(images()), want) < 1e-6


def test_all_that_is_left_to_train_gets_a_gradient():
    model = tiny_model('clip_vit', FREEZE_VIT=False, TRAIN__USE_CHECKPOINT=True).train()
    model(images()).square().sum().backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ['model.post_layernorm.weight', 'model.post_layernorm.bias']


def test_rates_fall_from_the_last_layer_to_the_patches():
    ratios = build_model(tiny_config('clip_vit')).lr_decay_keywords(0.5)
    assert ratios == {
        'layers.0.': 0.125, 'layers.1.': 0.25, 'layers.2.': 0.5, 'patch_embedding': 0.0625,
        'position_embedding': 0.0625, 'pre_layrnorm': 0.0625,
    }  # fmt: skip


def test_a_projector_is_not_among_its_heads():
    with pytest.raises(ConfigError, match=r"CLIP_VIT\.CLS_TARGET is 'clip_projector'; it can be"):
        build_model(tiny_config('clip_vit', CLS_TARGET='clip_projector'))
