"""A small model, its data and its optimizer, the same in every process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from packaging.version import Version
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.ds.load import load_ds_config
from internvl_ds.config.tree import default_config

CLASSES = 5
FEATURES = 12
GLOBAL_BATCH = 16
OFFLOAD, PERSISTENT = 4, 5
# One in which this package refuses more: see config/ds/unsupported.py.
OLD_DEEPSPEED = Version(deepspeed.__version__) < Version('0.19.8')


class Net(nn.Module):
    """With a frozen layer, sizes that divide by nothing, a buffer, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 19)
        self.frozen = nn.Linear(19, 19)
        self.norm = nn.LayerNorm(19)
        self.body = nn.Linear(19, 7)
        self.head = nn.Linear(7, CLASSES)
        self.tied = nn.Linear(19, 19, bias=False)
        self.again = nn.Linear(19, 19, bias=False)
        self.again.weight = self.tied.weight
        self.register_buffer('seen', torch.zeros(()))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        x = torch.nn.functional.gelu(self.stem(x))
        x = self.norm(x + self.frozen(x))
        x = self.again(torch.tanh(self.tied(x)))
        return self.head(torch.tanh(self.body(x)))


def make_model(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def make_optimizer(model: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    """AdamW with two weight-decay groups, built as the original does: one group per tensor."""
    groups = [
        {'params': [p], 'weight_decay': 0.0 if p.dim() == 1 else 0.05, 'lr': lr, 'name': name}
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    return torch.optim.AdamW(groups, lr=lr)


def make_sgd(model: nn.Module) -> torch.optim.SGD:
    """Unlike Adam it shows a gradient that is applied at a wrong size."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of an update: inputs (16, 12) float32 and targets (16,) int64."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(GLOBAL_BATCH, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (GLOBAL_BATCH,), generator=generator)


def micro_batch(step: int, micro: int, accumulation: int, rank: int, world: int) -> Any:
    """This rank's share of a micro-batch, on its device."""
    x, y = batch(step)
    size = GLOBAL_BATCH // accumulation // world
    start = (micro * world + rank) * size
    return on_device(x[start : start + size], y[start : start + size])


def on_device(*tensors: torch.Tensor) -> Any:
    """Inputs of an engine, on the accelerator's device; a list, or the only one itself."""
    moved = [tensor.to(get_accelerator().current_device_name()) for tensor in tensors]
    return moved if len(moved) > 1 else moved[0]


def make_config(output: str = '', **values: Any) -> CfgNode:
    """The default tree with OUTPUT, fp32 and dotted overrides (A__B for A.B)."""
    config = default_config()
    config.OUTPUT = output
    config.AMP_OPT_LEVEL = 'O0'
    config.CHECKPOINT.RENDEZVOUS_TIMEOUT = 30
    set_values(config, values)
    return config


def set_values(config: CfgNode, values: Mapping[str, Any]) -> None:
    """Sets dotted keys (A__B for A.B) of a tree that is not frozen, and freezes it."""
    for key, value in values.items():
        node = config
        *sections, last = key.split('__')
        for section in sections:
            node = node[section]
        node[last] = value
    config.freeze()


def precision_values(precision: str) -> dict[str, Any]:
    """The yacs values of 'fp32', of an engine's 'bf16' or 'fp16', or of 'autocast_bf16/fp16'."""
    if precision == 'fp32':
        return {'AMP_OPT_LEVEL': 'O0'}
    if precision == 'fp16':
        # A CPU trains in fp16 right, and DeepSpeed refuses it. For tests of the loss scale only.
        get_accelerator().is_fp16_supported = lambda: True
    return {
        'AMP_OPT_LEVEL': 'O1' if 'autocast' in precision else 'O2',
        'AMP_TYPE': 'bfloat16' if 'bf16' in precision else 'float16',
    }


def module_dtype(precision: str) -> torch.dtype:
    """The dtype of the module's weights, which its inputs must have."""
    return {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(precision, torch.float32)


def trained(layouts: Iterable[Any]) -> list[Any]:
    """Without those that the installed DeepSpeed does wrong, so that they are refused.

    With offload, and with gradients that are not contiguous, as reduced in the backward.
    """

    def wrong(x: Any) -> bool:
        text = str(x)
        return x == OFFLOAD or 'offload' in text or ('overlap' in text and 'copied' not in text)

    return [x for x in layouts if not (OLD_DEEPSPEED and wrong(x))]


def zero_json(stage: int) -> dict[str, Any]:
    """A ds_config of a stage; at stage 3 every parameter is partitioned, however small.

    OFFLOAD stands for the zero3_offload that ships, PERSISTENT for stage 3 with the small half of
    the parameters whole on every rank.
    """
    if stage == OFFLOAD:
        return load_ds_config('zero3_offload')
    zero: dict[str, Any] = {'stage': min(stage, 3)}
    if zero['stage'] == 3:
        zero['stage3_param_persistence_threshold'] = 50 if stage == PERSISTENT else 0
    return {'zero_optimization': zero}
