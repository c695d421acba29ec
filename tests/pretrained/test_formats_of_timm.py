"""Files in the formats that timm converts: the values are those of timm's own loading, exactly.

Each file is made from a small model of timm, its names are put back by hand to those of the project
that publishes such files, and both load it into the same model of another size.
"""

import logging
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch

from internvl_ds.config import default_config
from internvl_ds.utils import load_pretrained

VIT = {'embed_dim': 24, 'depth': 2, 'num_heads': 2, 'num_classes': 5}
EVA = {**VIT, 'embed_dim': 32}
SWIN = {'embed_dim': 12, 'depths': (1, 2), 'num_heads': (1, 2), 'num_classes': 5}


@dataclass
class Format:
    """A model of timm, its sizes in the file and in training, and the names in the file."""

    name: str
    settings: dict[str, Any]
    old: dict[str, Any] = field(default_factory=dict)
    new: dict[str, Any] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    extras: tuple[str, ...] = ()
    entry: str = ''


FORMATS = {
    'BEiT': Format('beit_base_patch16_224', VIT, {}, {'img_size': 384}, entry='model'),
    'BEiT, not square': Format('beit_base_patch16_224', VIT, {}, {'img_size': (96, 160)}),
    'BEiTv2': Format(
        'beitv2_base_patch16_224', VIT, {}, {'img_size': 192}, (('^', 'module.'),), entry='model'
    ),
    'EVA02': Format(
        'eva02_tiny_patch14_336', EVA, {'img_size': 70}, {'img_size': 112},
        (
            (r'mlp\.norm', 'mlp.ffn_ln'), (r'attn\.norm', 'attn.inner_attn_ln'),
            (r'mlp\.fc1_g', 'mlp.w1'), (r'mlp\.fc1_x', 'mlp.w2'), (r'mlp\.fc2', 'mlp.w3'),
            ('^fc_norm', 'norm'),
        ),
        ('mask_token', 'rope.freqs_cos'), 'module',
    ),
    'DINOv3': Format(
        'vit_small_patch16_dinov3', EVA, {'img_size': 64}, {'img_size': 96},
        (('gamma_1', 'ls1.gamma'), ('gamma_2', 'ls2.gamma'), ('reg_token', 'storage_tokens')),
        ('mask_token', 'rope_embed.periods'),
    ),
    'Swin': Format(
        'swin_tiny_patch4_window7_224', SWIN, {'img_size': 56},
        {'img_size': 64, 'window_size': 8},
        ((r'layers\.1\.downsample', 'layers.0.downsample'), (r'^head\.fc', 'head')),
        ('layers.0.blocks.0.attn.relative_position_index',), 'model',
    ),
    'Swin v2': Format(
        'swinv2_tiny_window8_256', SWIN, {'img_size': 64}, {'img_size': 128, 'window_size': 16},
        ((r'layers\.1\.downsample', 'layers.0.downsample'), (r'^head\.fc', 'head')),
        ('layers.0.blocks.0.attn.relative_coords_table',), 'model',
    ),
    'FlexiViT': Format(
        'flexivit_small', VIT, {'img_size': 64}, {'img_size': 72, 'patch_size': 12}
    ),
    'DINOv2': Format(
        'vit_small_patch14_dinov2', VIT, {'img_size': 70}, {'img_size': 98}, (), ('mask_token',)
    ),
    'DINOv2, registers': Format(
        'vit_small_patch14_reg4_dinov2', VIT, {'img_size': 70}, {'img_size': 98},
        (('reg_token', 'register_tokens'),), ('mask_token',),
    ),
    'DINOv2, giant': Format(
        'vit_giant_patch14_dinov2', VIT, {'img_size': 70}, {'img_size': 98},
        ((r'mlp\.fc1', 'mlp.w12'), (r'mlp\.fc2', 'mlp.w3')), ('mask_token',),
    ),
    'SigLIP of OpenCLIP': Format(
        'vit_base_patch16_siglip_224', VIT, {'img_size': 64}, {'img_size': 96},
        (('^', 'visual.trunk.'),), ('logit_scale', 'text.positional_embedding'),
    ),
    'OpenCLIP in DDP': Format(
        'vit_base_patch16_clip_224', VIT, {'img_size': 64}, {'img_size': 96},
        (('^', 'module.visual.trunk.'),), ('module.logit_scale',), 'state_dict',
    ),
    'CLIP': Format(
        'vit_base_patch16_clip_224', {**VIT, 'num_classes': 0}, {'img_size': 64}, {'img_size': 96},
        (
            ('^pos_embed', 'positional_embedding'), ('^cls_token', 'class_embedding'),
            ('^norm_pre', 'ln_pre'), ('^norm', 'ln_post'), (r'norm(\d)', r'ln_\1'),
            (r'^patch_embed\.proj', 'conv1'), (r'^blocks\.', 'transformer.resblocks.'),
            (r'attn\.qkv\.', 'attn.in_proj_'), (r'attn\.proj', 'attn.out_proj'),
            (r'mlp\.fc1', 'mlp.c_fc'), (r'mlp\.fc2', 'mlp.c_proj'), ('^', 'visual.'),
        ),
        ('logit_scale',),
    ),
    'MAE': Format(
        'vit_base_patch16_224.mae', {**VIT, 'num_classes': 0}, {'img_size': 64}, {'img_size': 96},
        entry='model',
    ),
    'SAM-ViT': Format(
        'samvit_base_patch16', {**VIT, 'num_classes': 0, 'global_attn_indexes': (1,)},
        {'img_size': 64}, {'img_size': 64},
        ((r'mlp\.fc', 'mlp.lin'), ('^', 'image_encoder.')), ('mask_decoder.iou_token.weight',),
    ),
    'InternViT': Format(
        'vit_intern300m_patch14_448', VIT, {'img_size': 56}, {'img_size': 84}, entry='model'
    ),
    'DeiT III': Format(
        'deit3_small_patch16_224', VIT, {'img_size': 64}, {'img_size': 96},
        ((r'ls([12])\.gamma', r'gamma_\1'),), entry='model',
    ),
    'ConvNeXt': Format(
        'convnext_atto', {'dims': (8, 16, 24, 32), 'depths': (1, 1, 1, 1), 'num_classes': 5},
        {}, {},
        (
            (r'^stem\.', 'downsample_layers.0.'),
            (r'^stages\.(\d)\.downsample\.', r'downsample_layers.\1.'),
            (r'^stages\.(\d)\.blocks\.', r'stages.\1.'), (r'conv_dw', 'dwconv'),
            (r'mlp\.fc(\d)', r'pwconv\1'), (r'^head\.norm', 'norm'), (r'^head\.fc', 'head'),
        ),
        entry='model',
    ),
    'RegNet of ClassyVision': Format('regnety_002', {'num_classes': 5}, entry='model'),
    'a ViT of other channels in the head': Format('vit_tiny_patch16_224', VIT, {}, {}),
}  # fmt: skip


def made(name, settings):
    """The same model at every call."""
    torch.manual_seed(0)
    return timm.create_model(name, **settings)


def checkpoint(form):
    torch.manual_seed(1)
    model = timm.create_model(form.name, **{**form.settings, **form.old})
    state = {}
    for key, value in model.state_dict().items():
        name = key
        for pattern, replacement in form.renames:
            name = re.sub(pattern, replacement, name)
        value = torch.randn(value.shape) if value.is_floating_point() else value
        state[name] = _as_published(form, name, value)
    for name in form.extras:
        state.setdefault(name, torch.zeros(1, 1, 4))
    return {form.entry: state} if form.entry else state


def _as_published(form, name, value):
    if form.name.endswith('clip_224') and name.endswith('class_embedding'):
        return value[0, 0]
    if form.name.endswith('clip_224') and name.endswith('positional_embedding'):
        return value[0]
    if form.extras and name == 'pos_embed' and 'reg4' in form.name:
        return torch.cat([torch.ones(1, 1, value.shape[-1]), value], 1)
    return value


@pytest.mark.parametrize('name', FORMATS)
def test_values_are_those_of_timms_own_loading(name, tmp_path):
    form = FORMATS[name]
    path = tmp_path / 'weights.pth'
    torch.save(checkpoint(form), path)
    settings = {**form.settings, **form.new}

    config = default_config()
    config.MODEL.PRETRAINED = str(path)
    ours = made(form.name, settings)
    first = {key: value.clone() for key, value in ours.state_dict().items()}
    report = load_pretrained(config, ours, logging.getLogger('formats'))
    assert report.matched == 1, report.missing

    overlay = {'file': str(path), 'custom_load': False, 'num_classes': settings['num_classes']}
    theirs = made(form.name, {**settings, 'pretrained': True, 'pretrained_cfg_overlay': overlay})
    state, wanted = ours.state_dict(), theirs.state_dict()
    assert state.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(state[key], wanted[key])] == []
    changed = [key for key in first if not torch.equal(first[key], state[key])]
    assert len(changed) >= sum(1 for _ in ours.parameters())
