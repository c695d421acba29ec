"""PRETRAINED of the original's models: every naming and file, and what is refused by name."""

from __future__ import annotations

import functools
import json
import logging
import operator
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from internvl_ds.checkpoint.sources import downloads
from internvl_ds.checkpoint.sources.weight_files import open_file
from internvl_ds.errors import PretrainedError
from internvl_ds.train.model import build_model
from internvl_ds.train.models.build import warn_of_random_backbone
from internvl_ds.zero.origins import origins_of
from tests.train.models.tiny import backbone_file, drawn, tiny_config, tiny_model

INTERN = 'intern_vit_6b'
TO_HF = (
    (r'^cls_token$', 'embeddings.class_embedding'),
    (r'^pos_embed$', 'embeddings.position_embedding'),
    (r'^patch_embed\.proj\.', 'embeddings.patch_embedding.'),
    (r'^blocks\.', 'encoder.layers.'),
    (r'\.gamma$', ''),
)


def published(kind=INTERN, **values):
    """The backbone's weights of a tiny model, by their published names."""
    model = tiny_model(kind, **values)
    return {name: model.state_dict()[name] for name in model.backbone_keys}


def hugging_face(state):
    for pattern, replacement in TO_HF:
        state = {re.sub(pattern, replacement, name): t for name, t in state.items()}
    return state


def write_pth(folder, state):
    (folder / 'config.json').write_text('of something else')
    torch.save({'module': state}, folder / 'backbone.pth')
    return folder / 'backbone.pth'


def write_plain(folder, state):
    torch.save(state, folder / 'plain.pth')
    return folder / 'plain.pth'


def write_safetensors(folder, state):
    """Two files with an index, in bfloat16, and the config.json of the model."""
    names, places = list(hugging_face(state)), {}
    for part in (0, 1):
        file = f'model-0000{part + 1}-of-00002.safetensors'
        own = {n: t.bfloat16() for n, t in hugging_face(state).items() if n in names[part::2]}
        save_file({n: t.contiguous() for n, t in own.items()}, folder / file)
        places.update(dict.fromkeys(own, file))
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': places}))
    settings = {'num_attention_heads': 4, 'layer_norm_eps': 1e-6, 'hidden_act': 'gelu'}
    (folder / 'config.json').write_text(json.dumps(settings))
    return folder


def write_bin(folder, state):
    torch.save(hugging_face(state), folder / 'pytorch_model.bin')
    return folder / 'pytorch_model.bin'


@pytest.mark.parametrize('norm', ['rms', 'ln'])
@pytest.mark.parametrize('write', [write_pth, write_plain, write_safetensors, write_bin])
def test_a_backbone_loads_whole_from_every_naming(tmp_path, write, norm):
    options = {'NORM_TYPE': norm, 'QKV_BIAS': norm == 'ln'}
    state = published(**options)
    half = write is write_safetensors
    path = write(tmp_path, state)

    model = build_model(tiny_config(PRETRAINED=str(path), **options))

    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16().float() if half else tensor)
    assert model.given_by_backbone == set(state) == set(model.backbone_keys)
    assert not model.head.bias.any()
    # For CHECKPOINT.FROZEN 'omit': where each is in the file.
    weights, origins = open_file(str(path)), origins_of(model)
    for name in state:
        place = functools.reduce(operator.getitem, origins[name].keys, weights)
        assert torch.equal(model.state_dict()[name], place.float()), name


@pytest.mark.parametrize('target', ['cls_patch_concat', 'attention_pooling', 'clip_projector'])
def test_the_published_projector_is_taken_where_it_is_used(tmp_path, target, caplog):
    logging.getLogger('internvl_ds').propagate = True
    caplog.set_level(logging.INFO)
    state = published(CLS_TARGET='clip_projector')
    assert len([name for name in state if name.startswith('clip_projector.')]) == 14

    config = tiny_config(PRETRAINED=str(write_pth(tmp_path, state)), CLS_TARGET=target)
    model = build_model(config)

    used = {n for n in state if target == 'clip_projector' or not n.startswith('clip_projector.')}
    assert model.given_by_backbone == used
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in used)
    assert ('left 14 entries out' in caplog.text) == (target != 'clip_projector')


@pytest.mark.parametrize('kind', [INTERN, 'clip_vit'])
def test_a_file_of_more_blocks_gives_the_first_and_says_which_are_left(tmp_path, kind, caplog):
    logging.getLogger('internvl_ds').propagate = True
    state = published(kind, DEPTH=4)  # as 45 of the 48 blocks of InternViT-6B-448px-V1-0

    model = build_model(tiny_config(kind, DEPTH=2, PRETRAINED=str(write_pth(tmp_path, state))))

    assert all(torch.equal(model.state_dict()[name], state[name]) for name in model.backbone_keys)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    assert (
        f'its blocks 2, 3 are not used: the model is built with fewer (MODEL.{kind.upper()}.DEPTH)'
        in warning
    )


def test_a_whole_model_gives_its_backbone(tmp_path):
    state = tiny_model(INTERN).state_dict()
    torch.save({'model': state}, tmp_path / 'whole.pth')

    model = build_model(tiny_config(PRETRAINED=str(tmp_path / 'whole.pth')))

    assert model.given_by_backbone == set(model.backbone_keys)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in model.backbone_keys)
    assert not model.head.bias.any()


def test_positions_and_patches_are_resized_as_by_the_original(tmp_path):
    state = published(DATA__IMG_SIZE=56)  # 4 x 4 patches of 14 pixels
    path = str(write_pth(tmp_path, state))

    config = tiny_config(PRETRAINED=path, PRETRAIN_SIZE=56, PATCH_SIZE=16, DATA__IMG_SIZE=96)
    model = build_model(config)

    grid = state['pos_embed'][:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (6, 6), mode='bicubic', align_corners=False)
    assert torch.equal(model.pos_embed[:, :1], state['pos_embed'][:, :1])
    assert torch.equal(model.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2))
    weight = F.interpolate(
        state['patch_embed.proj.weight'], (16, 16), mode='bicubic', align_corners=False
    )
    assert torch.equal(model.patch_embed.proj.weight, weight)


def test_clip_loads_from_the_whole_model_and_from_its_tower(tmp_path):
    state = published('clip_vit')
    theirs = {n.replace('model.', 'vision_model.', 1): t for n, t in state.items()}
    others = {
        'logit_scale': torch.ones(()), 'visual_projection.weight': torch.ones(2, 2),
        'vision_model.embeddings.position_ids': torch.arange(5).unsqueeze(0),
        'text_model.embeddings.position_ids': torch.arange(5).unsqueeze(0),
        'text_projection.weight': torch.ones(2, 2),
    }  # fmt: skip
    torch.save({**theirs, **others}, tmp_path / 'pytorch_model.bin')
    settings = {'vision_config': {'num_attention_heads': 4, 'hidden_act': 'quick_gelu'}}
    (tmp_path / 'config.json').write_text(json.dumps(settings))
    save_file({n: t.contiguous() for n, t in theirs.items()}, tmp_path / 'tower.safetensors')
    for path in (tmp_path, tmp_path / 'tower.safetensors'):
        model = build_model(tiny_config('clip_vit', PRETRAINED=str(path)))
        assert model.given_by_backbone == set(state)
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)


def test_clips_positions_are_resized_too(tmp_path):
    state = published('clip_vit', DATA__IMG_SIZE=56)
    path = str(write_plain(tmp_path, state))
    config = tiny_config('clip_vit', PRETRAINED=path, PRETRAIN_SIZE=56, DATA__IMG_SIZE=84)
    table = state['model.embeddings.position_embedding.weight']
    grid = table[1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (6, 6), mode='bicubic', align_corners=False)
    want = torch.cat([table[:1], grid[0].flatten(1).T])
    assert torch.equal(build_model(config).model.embeddings.position_embedding.weight, want)


def _without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ('change', 'values', 'message'),
    [
        (
            lambda s: _without(s, 'blocks.1.ls1.gamma'), {},
            r'1 names of the model are not in it \(blocks\.1\.ls1\.gamma\), and 0 of',
        ),
        (
            lambda s: s | {'blocks.1.gate.weight': torch.ones(32)}, {},
            r'0 names .* 1 of its names are not in the model \(blocks\.1\.gate\.weight\)',
        ),
        (lambda s: s, {'DEPTH': 4}, r'13 names of the model are not in it \(blocks\.3\.'),
        (lambda s: s, {'NORM_TYPE': 'ln'}, r'12 names of the model are not in it \(blocks\.0\.'),
        (lambda s: s, {'EMBED_DIM': 16}, r'entries do not fit the model: pos_embed'),
        (lambda s: s, {'CLS_TARGET': 'clip_projector'}, r'not in it \(clip_projector\.'),
        (
            lambda s: s, {'DATA__IMG_SIZE': 56, 'PRETRAIN_SIZE': 42},
            r'of 4 patches, and images of 42 pixels have 3 x 3 of 14: set '
            r'MODEL\.INTERN_VIT_6B\.PRETRAIN_SIZE',
        ),
        (lambda s: s | {'head_dist.bias': torch.ones(5)}, {}, r'not in the model \(head_dist\.'),
    ],
)  # fmt: skip
def test_another_backbone_is_refused_by_name(tmp_path, change, values, message):
    path = write_pth(tmp_path, change(published()))
    with pytest.raises(PretrainedError, match=message) as caught:
        build_model(tiny_config(PRETRAINED=str(path), **values))
    assert str(caught.value).startswith(f'MODEL.INTERN_VIT_6B.PRETRAINED {path}: ')


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'num_attention_heads': 8}, r'num_attention_heads 8, and the model is built with 4'),
        ({'hidden_act': 'silu'}, r"hidden_act 'silu', and the model is built with 'gelu'"),
    ],
)
def test_what_no_shape_tells_is_read_beside_the_file(tmp_path, settings, message):
    write_safetensors(tmp_path, published())
    (tmp_path / 'config.json').write_text(json.dumps(settings))
    with pytest.raises(PretrainedError, match=message):
        build_model(tiny_config(PRETRAINED=str(tmp_path)))


@pytest.mark.parametrize('name', ['org/tower', 'hf-hub:org/tower'])
def test_a_repository_comes_with_its_settings(tmp_path, monkeypatch, name):
    state = published('clip_vit')
    theirs = {n.replace('model.', 'vision_model.', 1): t for n, t in state.items()}
    save_file({n: t.contiguous() for n, t in theirs.items()}, tmp_path / 'model.safetensors')
    settings = tmp_path / 'settings'  # the client's cache has each file where it likes
    answers = {'hf-hub:org/tower': tmp_path / 'model.safetensors'}
    answers['hf-hub:org/tower:config.json'] = settings
    monkeypatch.setattr(downloads, 'fetch', lambda address, timeout: answers[address])
    config = tiny_config('clip_vit', PRETRAINED=name)
    settings.write_text(json.dumps({'vision_config': {'num_attention_heads': 4}}))
    model = build_model(config)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
    settings.write_text(json.dumps({'vision_config': {'num_attention_heads': 2}}))
    with pytest.raises(PretrainedError, match='num_attention_heads 2'):
        build_model(config)


def test_a_repository_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(PretrainedError, match=r'CLIP_VIT\.PRETRAINED nobody/none: no such file'):
        build_model(tiny_config('clip_vit', PRETRAINED='nobody/none'))
    with pytest.raises(PretrainedError, match=r'nobody/none\.pth: no such file$'):
        build_model(tiny_config('clip_vit', PRETRAINED='nobody/none.pth'))


def test_nothing_is_loaded_onto_the_meta_device():
    with torch.device('meta'):
        model = build_model(tiny_config(PRETRAINED='no/such/file.pth'))
    assert not model.given_by_backbone


def test_a_frozen_backbone_from_nowhere_is_told(tmp_path, caplog):
    def told(**values):
        caplog.clear()
        config = tiny_config(**values)
        warn_of_random_backbone(config, build_model(config), logging.getLogger('test'))
        return 'the frozen backbone is random' in caplog.text

    path = str(backbone_file(tmp_path, tiny_model()))
    assert told()
    assert 'MODEL.INTERN_VIT_6B.PRETRAINED' in caplog.text
    assert not told(FREEZE_VIT=False)
    assert not told(PRETRAINED=path)
    assert not told(MODEL__RESUME='ckpt_epoch_3')
    assert not told(MODEL__PRETRAINED=path)


def test_drawn_states_reach_every_tensor():
    model = tiny_model()
    assert all(torch.equal(t, drawn(model)[n]) for n, t in model.state_dict().items())
