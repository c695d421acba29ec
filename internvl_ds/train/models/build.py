"""Makes the model of MODEL.TYPE ``intern_vit_6b`` or ``clip_vit``, with the weights of its file."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.choices import require_one_of
from internvl_ds.config.counts import require_counts
from internvl_ds.pretrained.backbone import Backbone, load_backbone
from internvl_ds.pretrained.transforms import INTERNVIT_RENAMES
from internvl_ds.train.models.blocks import BlockOptions
from internvl_ds.train.models.clip_vit import ClipOptions, ClipViT
from internvl_ds.train.models.intern_vit import InternViT
from internvl_ds.train.models.probe import (
    ATTENTION_POOLING,
    CLIP_PROJECTOR,
    CLS_PATCH_CONCAT,
    Probe,
)

_logger = logging.getLogger(__name__)


def build_intern_vit(config: CfgNode) -> InternViT:
    """Builds InternViT by MODEL.INTERN_VIT_6B, and loads its PRETRAINED.

    Collective where PRETRAINED is set: every rank calls it. On the meta device nothing is loaded.

    Raises:
        ConfigError: for a setting that has no meaning.
        PretrainedError: as `load_backbone`.
    """
    section = 'MODEL.INTERN_VIT_6B'
    vit = _checked(config, section, ('DROP_RATE',))
    targets = (CLS_PATCH_CONCAT, ATTENTION_POOLING, CLIP_PROJECTOR)
    require_one_of(f'{section}.CLS_TARGET', vit.CLS_TARGET, targets)
    require_one_of(f'{section}.NORM_TYPE', vit.NORM_TYPE, ('rms', 'ln'))
    options = BlockOptions(
        width=vit.EMBED_DIM,
        heads=vit.NUM_HEADS,
        hidden=int(vit.EMBED_DIM * vit.MLP_RATIO),
        norm=vit.NORM_TYPE,
        qkv_bias=vit.QKV_BIAS,
        qk_norm=vit.QK_NORMALIZATION,
        layer_scale=vit.INIT_VALUES or 0.0,
    )
    model = InternViT(
        options,
        side=config.DATA.IMG_SIZE,
        patch=vit.PATCH_SIZE,
        depth=vit.DEPTH,
        drop_path=config.MODEL.DROP_PATH_RATE,
        freeze=vit.FREEZE_VIT,
        cls_target=vit.CLS_TARGET,
        classes=config.MODEL.NUM_CLASSES,
    )
    backbone = Backbone(
        key=f'{section}.PRETRAINED',
        path=str(vit.PRETRAINED or ''),
        keys=model.backbone_keys,
        renames=INTERNVIT_RENAMES,
        position='pos_embed',
        patch='patch_embed.proj.weight',
        image=vit.PRETRAIN_SIZE,
        unused=() if vit.CLS_TARGET == CLIP_PROJECTOR else ('clip_projector.',),
        settings={
            'num_attention_heads': vit.NUM_HEADS, 'layer_norm_eps': 1e-6, 'hidden_act': 'gelu',
        },
    )  # fmt: skip
    _load(config, model, backbone)
    return model


def build_clip_vit(config: CfgNode) -> ClipViT:
    """Builds CLIP's image tower by MODEL.CLIP_VIT, and loads its PRETRAINED; as the other."""
    section = 'MODEL.CLIP_VIT'
    vit = _checked(config, section, ('DROP_RATE', 'DROP_PATH_RATE'))
    require_one_of(f'{section}.CLS_TARGET', vit.CLS_TARGET, (CLS_PATCH_CONCAT, ATTENTION_POOLING))
    options = ClipOptions(
        side=config.DATA.IMG_SIZE,
        patch=vit.PATCH_SIZE,
        width=vit.EMBED_DIM,
        heads=vit.NUM_HEADS,
        hidden=int(vit.EMBED_DIM * vit.MLP_RATIO),
        depth=vit.DEPTH,
    )
    model = ClipViT(
        options,
        freeze=vit.FREEZE_VIT,
        cls_target=vit.CLS_TARGET,
        classes=config.MODEL.NUM_CLASSES,
    )
    backbone = Backbone(
        key=f'{section}.PRETRAINED',
        path=str(vit.PRETRAINED or ''),
        keys=model.backbone_keys,
        renames=[(r'^vision_model\.', 'model.')],
        position='model.embeddings.position_embedding.weight',
        patch='model.embeddings.patch_embedding.weight',
        image=vit.PRETRAIN_SIZE,
        unused=(
            'text_model.', 'text_projection.', 'visual_projection.', 'logit_scale',
            'model.embeddings.position_ids',
        ),
        settings={
            'num_attention_heads': vit.NUM_HEADS, 'layer_norm_eps': 1e-5,
            'hidden_act': 'quick_gelu',
        },
    )  # fmt: skip
    _load(config, model, backbone)
    return model


BUILDERS = {'intern_vit_6b': build_intern_vit, 'clip_vit': build_clip_vit}


def warn_of_random_backbone(config: CfgNode, model: nn.Module, logger: logging.Logger) -> None:
    """Warns of a frozen backbone with random weights, which would stay random."""
    names = getattr(model, 'given_by_backbone', None)
    if names is None or names or not getattr(model, 'frozen', False):
        return
    if not (config.MODEL.RESUME or config.MODEL.PRETRAINED):
        section = config.MODEL.TYPE.upper()
        logger.warning(
            f'MODEL.{section}.FREEZE_VIT is True, and neither MODEL.{section}.PRETRAINED nor '
            'MODEL.RESUME nor MODEL.PRETRAINED gives weights: the frozen backbone is random'
        )


def _load(config: CfgNode, model: Probe, backbone: Backbone) -> None:
    if backbone.path and not any(p.is_meta for p in model.parameters()):
        model.given_by_backbone = frozenset(load_backbone(config, model, backbone, _logger).loaded)


def _checked(config: CfgNode, section: str, unused: Sequence[str]) -> CfgNode:
    """Checks the counts of a model's section; logs the general keys without effect."""
    require_counts(config, (f'{section}.',))
    require_one_of('MODEL.DROP_PATH_TYPE', config.MODEL.DROP_PATH_TYPE, ('linear',))
    vit: CfgNode = config.MODEL[section.partition('.')[2]]
    for name in unused:
        if config.MODEL[name] and not (vit.FREEZE_VIT and name == 'DROP_PATH_RATE'):
            kind = config.MODEL.TYPE
            _logger.warning('MODEL.%s %s is not used by %s', name, config.MODEL[name], kind)
    return vit
