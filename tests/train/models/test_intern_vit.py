"""InternViT beside its formulas: every head, both norms; freezing, recomputing, layer-wise lr."""

import pytest
import torch

from internvl_ds.errors import ConfigError
from internvl_ds.train.model import build_model, set_train_mode
from tests.train.models import formulas
from tests.train.models.tiny import difference, images, tiny_config, tiny_model

TARGETS = ('cls_patch_concat', 'attention_pooling', 'clip_projector')


def expected(model, target, norm='rms'):
    """In float64, so that all that differs is the model's own rounding."""
    state = {name: t.double() for name, t in model.state_dict().items()}
    return formulas.intern_vit(state, images().double(), 4, target, norm)


@pytest.mark.parametrize('norm', ['rms', 'ln'])
@pytest.mark.parametrize('target', TARGETS)
def test_the_forward_pass_is_the_formulas(target, norm):
    options = {'CLS_TARGET': target, 'NORM_TYPE': norm, 'QKV_BIAS': norm == 'ln'}
    model = tiny_model(**options)
    with torch.no_grad():
        logits = model(images())
    assert logits.shape == (6, 5)
    # Rounding is 2^-24 = 6e-8 for each of some dozens of sums in a row, which add as a random walk.
    assert difference(logits, expected(model, target, norm)) < 1e-6


@pytest.mark.parametrize('target', TARGETS)
def test_bfloat16_is_near_the_formulas(target):
    model = tiny_model(CLS_TARGET=target)
    want = expected(model, target)
    with torch.no_grad():
        half = tiny_model(CLS_TARGET=target).bfloat16()(images().bfloat16())
        with torch.autocast('cpu', torch.bfloat16):
            cast = model(images())
    # A number is rounded by 2^-9 = 0.2 % at most. 3 blocks of about 8 roundings of what is added to
    # the tokens, and 5 of the head: sqrt(29) * 0.2 % = 1.1 % as a random walk; three times that.
    assert half.dtype == torch.bfloat16
    assert difference(half, want) < 0.033
    assert difference(cast, want) < 0.033


def test_without_what_can_be_left_out():
    options = {'QK_NORMALIZATION': False, 'INIT_VALUES': 0.0, 'MODEL__NUM_CLASSES': 0}
    model = tiny_model(**options)
    assert not [n for n in model.state_dict() if 'q_norm' in n or 'ls1' in n or 'head' in n]
    state = {name: t.double() for name, t in model.state_dict().items()}
    state['head.weight'], state['head.bias'] = torch.eye(64).double(), torch.zeros(64).double()
    want = formulas.intern_vit(state, images().double(), 4, 'cls_patch_concat', 'rms')
    with torch.no_grad():
        assert difference(model(images()), want) < 1e-6


def test_names_and_their_order_are_the_published_ones():
    model = build_model(tiny_config(DEPTH=1, CLS_TARGET='attention_pooling'))
    pooling = ['norm1_q', 'norm1_k', 'norm1_v', 'cross_attn.proj']
    names = ['pos_embed', 'cls_token', 'patch_embed.proj.weight', 'patch_embed.proj.bias']
    block = [
        'norm1.weight', 'attn.qkv.weight', 'attn.proj.weight', 'attn.proj.bias',
        'attn.q_norm.weight', 'attn.k_norm.weight', 'ls1.gamma', 'norm2.weight', 'mlp.fc1.weight',
        'mlp.fc1.bias', 'mlp.fc2.weight', 'mlp.fc2.bias', 'ls2.gamma',
    ]  # fmt: skip
    names += [f'blocks.0.{name}' for name in block]
    assert list(model.backbone_keys) == names
    both = ('weight', 'bias')
    names += [f'attn_pooling.{layer}.{kind}' for layer in pooling[:3] for kind in both]
    names += [f'attn_pooling.cross_attn.{which}_bias' for which in 'qkv']
    names += [f'attn_pooling.cross_attn.{which}.weight' for which in 'qkv']
    names += [f'attn_pooling.{pooling[3]}.{kind}' for kind in both]
    names += ['norm.weight', 'norm.bias', 'norm.running_mean', 'norm.running_var']
    names += ['norm.num_batches_tracked', 'head.weight', 'head.bias']
    # The order of parameters is that of an original's optimizer state.
    assert list(model.state_dict()) == names


def test_a_head_starts_small():
    torch.manual_seed(0)
    model = build_model(tiny_config(MODEL__NUM_CLASSES=1000))
    # 64000 draws: the standard deviation of theirs is 0.01 / sqrt(2 * 64000) = 0.3 %.
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.015)
    assert not model.head.bias.any()


@pytest.mark.parametrize('target', TARGETS)
def test_a_frozen_backbone_leaves_the_head_to_train(target):
    model = build_model(tiny_config(CLS_TARGET=target))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    pooling = {n.partition('.')[0] for n in trained} - {'norm', 'head'}
    assert pooling == ({'attn_pooling'} if target == 'attention_pooling' else set())
    assert not set(trained) & set(model.backbone_keys)
    assert all(p.requires_grad for p in build_model(tiny_config(FREEZE_VIT=False)).parameters())


@pytest.mark.parametrize('freeze_backbone', [None, True])
def test_the_norm_of_the_head_learns_its_statistics(freeze_backbone):
    model = tiny_model()
    before = model.norm.running_mean.clone()
    set_train_mode(model, model, freeze_backbone)
    with torch.no_grad():
        first, again = model(images()), model(images())
    assert torch.equal(first, again)  # no drop path: the backbone is the same each time
    features = model.eval().forward_features(images())
    pooled = torch.cat((features[:, 0], features[:, 1:].mean(1)), -1)
    after = 0.9 * (0.9 * before + 0.1 * pooled.mean(0)) + 0.1 * pooled.mean(0)
    assert difference(model.norm.running_mean, after) < 1e-6
    assert model.norm.num_batches_tracked == 9  # 7 were in the drawn state


def test_paths_of_a_frozen_backbone_are_dropped_as_in_the_original():
    model = tiny_model(MODEL__DROP_PATH_RATE=0.5).train()
    assert [b.drop_path2.drop_prob for b in model.blocks[1:]] == [0.25, 0.5]
    with torch.no_grad():
        assert not torch.equal(model(images()), model(images()))


@pytest.mark.parametrize('freeze', [True, False])
def test_recomputing_changes_no_bit(freeze):
    gradients = []
    for recompute in (False, True):
        model = tiny_model(
            FREEZE_VIT=freeze, MODEL__DROP_PATH_RATE=0.3, TRAIN__USE_CHECKPOINT=recompute
        ).train()
        calls = []
        model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(3)
        model(images()).square().sum().backward()
        assert len(calls) == (2 if recompute and not freeze else 1)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert len(plain) == (4 if freeze else len(list(model.parameters())))
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_rates_fall_from_the_last_block_to_the_patches():
    ratios = build_model(tiny_config()).lr_decay_keywords(0.5)
    assert ratios == {
        'blocks.0.': 0.125, 'blocks.1.': 0.25, 'blocks.2.': 0.5,
        'patch_embed': 0.0625, 'pos_embed': 0.0625, 'cls_token': 0.0625,
    }  # fmt: skip


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'CLS_TARGET': 'cls'}, r"6B\.CLS_TARGET is 'cls'; it can be 'cls_patch_concat'"),
        ({'NORM_TYPE': 'rmsnorm'}, r"NORM_TYPE is 'rmsnorm'; it can be 'rms', 'ln'"),
        ({'NUM_HEADS': 5}, r'a width of 32 cannot be divided among 5 heads'),
        ({'EMBED_DIM': 24, 'CLS_TARGET': 'clip_projector'}, r'24 cannot be divided among 16 heads'),
        ({'DEPTH': 0}, r'INTERN_VIT_6B\.DEPTH is 0; it takes a number of at least 1'),
        ({'MODEL__DROP_PATH_TYPE': 'uniform'}, r"DROP_PATH_TYPE is 'uniform'; it can be 'linear'"),
        ({'DEPHT': 3}, r'unknown key MODEL\.INTERN_VIT_6B\.DEPHT; .* MODEL\.INTERN_VIT_6B\.DEPTH'),
    ],
)  # fmt: skip
def test_settings_without_a_meaning_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        build_model(tiny_config(**values))
