"""A torch optimizer's state dict, whose keys are numbers, and the same by parameter name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from internvl_ds.checkpoint.named import Flat
from internvl_ds.errors import CheckpointMismatch, few

State = tuple[
    dict[str, Flat], dict[str, dict[str, Flat]], dict[str, dict[str, float]]
]  # masters, moments, steps


def state_by_order(
    where: str,
    optimizer: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
    weights: Mapping[str, torch.Tensor],
    masters: Sequence[torch.Tensor] | None = None,
) -> State:
    """Names a torch optimizer's state, whose keys are numbers, by order and group as torch does.

    Args:
        where: the checkpoint's path, for errors.
        optimizer: its state dict.
        groups: the names of each group's parameters, in order.
        weights: name -> weight.
        masters: the fp32 weights in the same order, where ``weights`` are rounded.

    Returns:
        Masters, moments and steps by name.

    Raises:
        CheckpointMismatch: when the groups are others, or a state is of another shape.
    """
    saved = [group['params'] for group in optimizer.get('param_groups', [])]
    if [len(group) for group in saved] != [len(group) for group in groups]:
        raise CheckpointMismatch(
            f'{where}: its optimizer has {len(saved)} parameter groups with '
            f'{few([len(g) for g in saved])} tensors, and this run has {len(groups)} with '
            f'{few([len(g) for g in groups])}'
        )
    names = list(itertools.chain.from_iterable(groups))
    keys = list(itertools.chain.from_iterable(saved))
    absent = [name for name in names if name not in weights]
    if absent:
        raise CheckpointMismatch(
            f'{where}: {len(absent)} parameters of the optimizer are not in it: {few(absent)}'
        )
    found: State = ({}, {}, {})
    for index, (name, key) in enumerate(zip(names, keys, strict=True)):
        weight = weights[name]
        master = weight if masters is None else masters[index].detach()
        state = optimizer['state'].get(key, {})
        tensors = {k: t for k, t in state.items() if isinstance(t, torch.Tensor) and t.dim()}
        for what, tensor in (('the master', master), *tensors.items()):
            if tensor.shape != weight.shape:
                raise CheckpointMismatch(
                    f'{where}: {what} of parameter {index} has shape {tuple(tensor.shape)}, and '
                    f'{name} has {tuple(weight.shape)}: the parameters are in another order'
                )
        found[0][name] = Flat.of(f'{where}: {name}', master)
        found[1][name] = {k: Flat.of(f'{where}: {k} of {name}', t) for k, t in tensors.items()}
        found[2][name] = {
            k: float(v) for k, v in state.items() if k not in tensors and v is not None
        }
    return found
