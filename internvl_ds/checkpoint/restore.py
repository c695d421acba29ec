"""Putting whole weights, by name, into a plain module or an engine's partitions."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from internvl_ds.engine.registry import wrapper_of
from internvl_ds.errors import CheckpointMismatch, few
from internvl_ds.zero.lazy_tensor import Flat
from internvl_ds.zero.parameters import copy_slice, is_sharded, whole_shape


def model_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> whole shape of every parameter and buffer of a state dict, partitioned or not."""
    state = module.state_dict(keep_vars=True)
    return {name: tuple(whole_shape(t)) for name, t in state.items()}


def require_same_model(
    saved: Mapping[str, tuple[int, ...]], running: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raises CheckpointMismatch for a checkpoint of another model; names the first keys."""
    gaps = [name for name in running if name not in saved]
    extras = [name for name in saved if name not in running]
    changes = [n for n in running if n in saved and tuple(saved[n]) != tuple(running[n])]
    if not (gaps or extras or changes):
        return
    parts = []
    if gaps:
        parts.append(f'{len(gaps)} keys are not in it: {few(gaps)}')
    if extras:
        parts.append(f'{len(extras)} keys are not in the model: {few(extras)}')
    if changes:
        shapes = [f'{n} {tuple(saved[n])} -> {tuple(running[n])}' for n in changes]
        parts.append(f'{len(changes)} have another shape (checkpoint -> model): {few(shapes)}')
    raise CheckpointMismatch(f'{where}: made for another model; {"; ".join(parts)}')


def given_by_backbone(module: nn.Module) -> frozenset[str]:
    """The names that a .pth of a head alone may lack: another file has just given their values.

    The model says so by an attribute of that name.
    """
    return frozenset(getattr(module, 'given_by_backbone', ()))


@torch.no_grad()
def load_weights(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    where: str,
    may_lack: Container[str] = (),
) -> None:
    """Copies whole weights into a plain module or an engine. Collective: every rank calls it.

    An engine's fp32 masters are set from the weights that it computes with; the optimizer's state
    is left as it is.

    Args:
        model: a plain module, or an engine.
        weights: name -> whole tensor, any device and dtype.
        where: the checkpoint's path, for the CheckpointMismatch before anything is changed.
        may_lack: names that stay as they are where the weights lack them.
    """
    engine = model if isinstance(model, DeepSpeedEngine) else None
    module = engine.module if engine is not None else model
    shapes = {name: tuple(t.shape) for name, t in weights.items()}
    running = model_shapes(module).items()
    expected = {name: shape for name, shape in running if name in shapes or name not in may_lack}
    require_same_model(shapes, expected, where)
    wrapper = wrapper_of(engine) if engine is not None else None
    if wrapper is not None and wrapper.sharded:
        wrapper.release_gathered()
        for name, target in module.state_dict(keep_vars=True).items():
            if name not in weights:
                continue
            if is_sharded(target):
                copy_slice(target, Flat.of(f'{where}: {name}', weights[name]))
            else:
                target.copy_(weights[name])
        wrapper.gather_persistent()
    else:
        module.load_state_dict(weights, strict=False)  # of the same names, but for may_lack
    if wrapper is not None:
        wrapper.pull_masters()
