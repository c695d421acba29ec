"""A small model of each of timm's families: one module of timm.models, by its name there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.models import _registry
from torch import nn

_VIT = {'depth': 1, 'embed_dim': 48, 'num_heads': 3}
_ONES: dict[str, Any] = {'depths': (1, 1, 1, 1)}

# family -> the smallest model that timm has of it, and settings that make that one smaller.
_SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    'beit': ('beit_base_patch16_224', _VIT),
    'byoanet': ('halonet_h1', {}),
    'byobnet': ('test_byobnet', {}),
    'cait': ('cait_xxs24_224', _VIT),
    'coat': ('coat_tiny', {}),
    'convit': ('convit_tiny', {'depth': 2}),
    'convmixer': ('convmixer_768_32', {}),
    'convnext': ('test_convnext', {}),
    'crossvit': ('crossvit_tiny_240', {}),
    'cspnet': ('cs3darknet_focus_s', {}),
    'cspnext': ('cspnext_tiny', {}),
    'davit': ('davit_tiny', _ONES),
    'deepseek_vit': ('deepseek_vit_412m', _VIT),
    'deit': ('deit_tiny_distilled_patch16_224', _VIT),
    'densenet': ('densenet121', {'block_config': (1, 1, 1, 1)}),
    'dla': ('dla46x_c', {}),
    'edgenext': ('edgenext_xx_small', {}),
    'efficientformer_v2': ('efficientformerv2_s0', {}),
    'efficientnet': ('test_efficientnet', {}),
    'efficientvim': ('efficientvim_m1', {}),
    'eva': ('eva02_tiny_patch14_224', _VIT),
    'fasternet': ('fasternet_t0', {}),
    'fastvit': ('fastvit_t8', {}),
    'focalnet': ('focalnet_tiny_srf', {}),
    'gcvit': ('gcvit_xxtiny', {}),
    'gemma4_vit': ('gemma4_vit_167m', _VIT),
    'ghostnet': ('ghostnet_050', {}),
    'hgnet': ('hgnetv2_b0', {}),
    'hiera': ('hiera_tiny_224', {'stages': (1, 1, 1, 1)}),
    'hieradet_sam2': ('sam2_hiera_tiny', {'stages': (1, 1, 1, 1), 'global_att_blocks': ()}),
    'hrnet': ('hrnet_w18_small', {}),
    'iformer': ('iformer_t', {}),
    'inception_next': ('inception_next_atto', {}),
    'levit': ('levit_128s', {}),
    'mambaout': ('test_mambaout', {}),
    'maxxvit': ('test_coatnet', {}),
    'metaformer': ('caformer_s18', {}),
    'mlp_mixer': ('gmlp_ti16_224', {}),
    'mobilenetv3': ('mobilenetv3_small_050', {}),
    'mobilenetv5': ('mobilenetv5_base', {}),
    'mobilevit': ('mobilevit_xxs', {}),
    'mvitv2': ('mvitv2_tiny', {}),
    'naflexvit': ('naflexvit_base_patch16_siglip', _VIT),
    'nest': ('nest_tiny', {}),
    'nextvit': ('nextvit_small', {}),
    'nfnet': ('test_nfnet', {}),
    'pit': ('pit_ti_distilled_224', {}),
    'pvt_v2': ('pvt_v2_b0', {}),
    'qwen3_vit': ('qwen3_vit_88m', _VIT),
    'rdnet': ('rdnet_tiny', {}),
    'regnet': ('regnety_002', {}),
    'repghost': ('repghostnet_050', {}),
    'repvit': ('repvit_m0_9', {}),
    'res2net': ('res2net50_14w_8s', {'layers': (1, 1, 1, 1)}),
    'resnest': ('resnest14d', {}),
    'resnet': ('test_resnet', {}),
    'senet': ('legacy_seresnet18', {}),
    'sequencer': ('sequencer2d_s', {'layers': (1, 1, 1, 1)}),
    'starnet': ('starnet_s050', {}),
    'swiftformer': ('swiftformer_xs', {}),
    'swin_transformer': ('swin_tiny_patch4_window7_224', {**_ONES, 'embed_dim': 48}),
    'swin_transformer_v2': ('swinv2_tiny_window8_256', {**_ONES, 'embed_dim': 48}),
    'swin_transformer_v2_cr': ('swinv2_cr_tiny_224', {**_ONES, 'embed_dim': 48}),
    'tnt': ('tnt_s_legacy_patch16_224', {'depth': 1}),
    'tresnet': ('tresnet_m', {}),
    'twins': ('twins_svt_small', _ONES),
    'vgg': ('vgg11', {'mlp_ratio': 0.01}),
    'visformer': ('visformer_tiny', {}),
    'vision_transformer': ('test_vit', {}),
    'vision_transformer_hybrid': ('vit_tiny_r_s16_p8_224', _VIT),
    'vision_transformer_relpos': ('test_vit_relpos', {}),
    'vision_transformer_sam': ('samvit_base_patch16_224', _VIT),
    'vitamin': ('vitamin_small_224', {}),
    'volo': ('volo_d1_224', {}),
    'vovnet': ('ese_vovnet19b_slim_dw', {}),
    'xcit': ('xcit_nano_12_p8_224', {'depth': 1}),
}


def families() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Family, model and settings, of every family that this timm has; unknown ones are tried."""
    listed: dict[str, str] = {}
    for name in timm.list_models():
        listed.setdefault(_registry._model_to_module[name], name)
    for family, first in sorted(listed.items()):
        yield (family, *_SMALL.get(family, (first, {})))


def build(name: str, classes: int, settings: dict[str, Any]) -> nn.Module:
    """The model in bfloat16, without memory."""
    with torch.device('meta'):
        return timm.create_model(name, num_classes=classes, **settings).bfloat16()
