"""Tiny models of the original's two kinds, their weights drawn anew, and files of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.tree import default_config, merge_opts
from internvl_ds.train.model import build_model

SIDE = 28  # pixels: 2 x 2 patches
CLASSES = 5


def tiny_config(kind: str = 'intern_vit_6b', **values: Any) -> CfgNode:
    """A config of MODEL.TYPE ``kind``; keys of its section, or whole ones with ``__`` for dots."""
    section = f'MODEL.{kind.upper()}'
    opts: dict[str, Any] = {
        'MODEL.TYPE': kind, 'MODEL.NUM_CLASSES': CLASSES, 'MODEL.DROP_PATH_RATE': 0.0,
        'DATA.IMG_SIZE': SIDE, f'{section}.EMBED_DIM': 32, f'{section}.NUM_HEADS': 4,
        f'{section}.DEPTH': 3, f'{section}.PRETRAIN_SIZE': SIDE, 'MODEL.CLIP_VIT.PRETRAINED': '',
    }  # fmt: skip
    for key, value in values.items():
        opts[key.replace('__', '.') if '__' in key else f'{section}.{key}'] = value
    config = default_config()
    merge_opts(config, [item for pair in opts.items() for item in pair])
    return config


def drawn(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of the model's names and shapes, every number of it random."""
    numbers = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.state_dict().items():
        state[name] = torch.randn(value.shape, generator=numbers) * 0.3
        if name.endswith(('norm.weight', 'gamma')) or re.search(r'norm\w*\.weight$', name):
            state[name] += 1.0
        if name.endswith('running_var'):
            state[name] = state[name].square() + 0.5
        if name.endswith('num_batches_tracked'):
            state[name] = torch.tensor(7)
    return state


def tiny_model(kind: str = 'intern_vit_6b', **values: Any) -> nn.Module:
    """The model of `tiny_config` in eval mode, its weights `drawn`."""
    model = build_model(tiny_config(kind, **values))
    model.load_state_dict(drawn(model))
    return model.eval()


def backbone_file(folder: Path, model: Any) -> Path:
    """The backbone of a model, as the original publishes it."""
    state = model.state_dict()
    torch.save({'module': {n: state[n] for n in model.backbone_keys}}, folder / 'backbone.pth')
    return folder / 'backbone.pth'


def head_file(folder: Path, model: Any) -> Path:
    """The head of a model, as the original publishes it."""
    state = {n: t for n, t in model.state_dict().items() if n not in model.backbone_keys}
    torch.save({'model': state}, folder / 'head.pth')
    return folder / 'head.pth'


def images(count: int = 6, side: int = SIDE, seed: int = 1) -> torch.Tensor:
    """Random images."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of what two tensors differ by, in units of the second's."""
    return float((a.double() - b.double()).norm() / b.double().norm())
