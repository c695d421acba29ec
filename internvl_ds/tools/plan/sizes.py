"""Counts a configured model's elements by their role. Allocates nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.tree import set_options
from internvl_ds.engine.param_groups import merge_param_groups
from internvl_ds.errors import ConfigError
from internvl_ds.train.model import build_model, set_train_mode
from internvl_ds.train.optim import build_optimizer
from internvl_ds.zero.muon.routing import is_muon, route_of

# Tensors that tell how much state an optimizer keeps.
_VECTOR, _MATRIX = (64,), (8, 8)


@dataclass(frozen=True)
class Sizes:
    """The elements of a model."""

    # of each trained parameter, by the optimizer's parameter group
    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...]  # of each parameter that is not trained
    float_buffers: int  # of all buffers that are floating point
    other_buffers: int  # bytes of the others
    moments: float  # fp32 values that the optimizer keeps for each trained element
    largest_module: int  # of the module with the most parameters of its own

    @property
    def trained(self) -> int:
        """Elements that are trained."""
        return sum(map(sum, self.groups))

    @property
    def parameters(self) -> int:
        """Elements of all parameters, frozen ones included."""
        return self.trained + sum(self.frozen)

    @property
    def largest(self) -> int:
        """Elements of the largest trained parameter."""
        return max(max(group) for group in self.groups)


def meta_model(config: CfgNode) -> nn.Module:
    """The configured model on the meta device, in the training mode that a run has it in.

    Raises:
        ConfigError: for settings that `build_model` refuses.
    """
    with torch.device('meta'):
        model = build_model(config)
    set_train_mode(model, model, config.TRAIN.OPTIMIZER.FREEZE_BACKBONE)
    return model


def with_recompute(config: CfgNode, recompute: bool) -> CfgNode:
    """The yacs tree with another TRAIN.USE_CHECKPOINT."""
    return set_options(config.clone(), {'TRAIN.USE_CHECKPOINT': recompute})


def can_recompute(config: CfgNode) -> bool:
    """Whether the model has activation checkpointing; allocates nothing."""
    try:
        meta_model(with_recompute(config, True))
    except ConfigError:
        return False
    except Exception:  # a model of the user's own that cannot be built so: a run will tell
        return True
    return True


def sizes_of(model: nn.Module, config: CfgNode) -> Sizes:
    """Counts the elements of a model that `meta_model` built.

    Raises:
        ConfigError: for an optimizer that does not exist.
    """
    optimizer = build_optimizer(config, model, 1e-3)
    merge_param_groups(optimizer, {}, stage=1)  # as `initialize` does
    groups = [tuple(p.numel() for p in group['params']) for group in optimizer.param_groups]
    whole = [is_muon(optimizer) and bool(route_of(optimizer, g)) for g in optimizer.param_groups]
    matrices = sum(sum(group) for group, is_whole in zip(groups, whole, strict=True) if is_whole)
    moments = _moments(config, _VECTOR)
    if matrices:
        moments += (_moments(config, _MATRIX) - moments) * matrices / sum(map(sum, groups))
    floats = [b for b in model.buffers() if b.is_floating_point()]
    others = [b for b in model.buffers() if not b.is_floating_point()]
    return Sizes(
        groups=tuple(filter(None, groups)),
        frozen=tuple(p.numel() for p in model.parameters() if not p.requires_grad),
        float_buffers=sum(b.numel() for b in floats),
        other_buffers=sum(b.numel() * b.element_size() for b in others),
        moments=moments,
        largest_module=max(
            sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
        ),
    )


def _moments(config: CfgNode, shape: tuple[int, ...]) -> float:
    """fp32 values that the configured optimizer keeps for each element of a tensor.

    The optimizer makes one step with a tensor of a few elements: flat as ZeRO's are, or a matrix
    for a Muon.
    """
    probe = nn.Linear(1, 1, bias=False)
    probe.weight = nn.Parameter(torch.zeros(shape))
    plain = set_options(config.clone(), {'TRAIN.LR_LAYER_DECAY': False})
    optimizer = build_optimizer(plain, probe, 1e-3)
    probe.weight.grad = torch.ones(shape)
    optimizer.step()
    values = optimizer.state[probe.weight].values()
    return sum(map(_elements, values)) / math.prod(shape)


def _elements(value: Any) -> float:
    """fp32 values in an entry of an optimizer's state, without the step counter."""
    if isinstance(value, torch.Tensor) and value.numel() > 1:
        return value.numel() * value.element_size() / 4
    if isinstance(value, Mapping):
        return sum(map(_elements, value.values()))
    return 0.0
