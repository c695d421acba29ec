"""Merges parameter groups of equal settings, and adapts the scheduler.

The original builds one group per tensor, and ZeRO partitions and reduces group by group, so
hundreds of groups are slow. Merging changes no tensor's lr or weight decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from internvl_ds.errors import ConfigError, few
from internvl_ds.zero.muon.routing import MEMBERSHIP, divided

# Lists with one entry per parameter group: timm's schedulers keep the first two, torch's the rest.
PER_GROUP_LISTS = frozenset({'base_values', 'warmup_steps', 'base_lrs', 'lr_lambdas', '_last_lr'})


class MergedGroups(NamedTuple):
    """The result of merging the client's parameter groups.

    Attributes:
        names: of the parameters of each group as the client built it.
        origins: for each group that there is now, the index of the client's whose settings it has.
        now: of the parameters of each group that there is now.
    """

    names: list[list[str]]
    origins: list[int]
    now: list[list[str]]


def merge_param_groups(
    optimizer: torch.optim.Optimizer, names: Mapping[Any, str], stage: int = 0
) -> MergedGroups:
    """Merges the optimizer's groups of equal settings, in place, and drops empty ones.

    Two groups are equal when every entry but their tensors and names is: lr, weight_decay, betas,
    initial_lr, lr_scale and whatever else the client put there. Order is that of first appearance.
    At ZeRO stages 1 to 3 a group of timm's Muon is divided first: see `divided`.

    Args:
        optimizer: a fresh optimizer (its state is per tensor and stays as it is).
        names: the name of each parameter of the model; kept in the group as ``param_names``.
        stage: of ZeRO.

    Returns:
        The groups as they were, and which is now which.
    """
    merged: dict[tuple, dict[str, Any]] = {}
    origins: list[int] = []
    before = [[names.get(p, '') for p in group['params']] for group in optimizer.param_groups]
    for index, group in enumerate(optimizer.param_groups):
        shared = {k: v for k, v in group.items() if k not in MEMBERSHIP}
        parts = divided(optimizer, group) if stage else [({}, group['params'])]
        for entries, params in (part for part in parts if part[1]):
            settings = {**shared, **entries}
            key = tuple(sorted((k, _exact(v)) for k, v in settings.items()))
            if key not in merged:
                merged[key] = {**settings, 'params': [], 'param_names': []}
                origins.append(index)
            merged[key]['params'] += params
            merged[key]['param_names'] += [names.get(p, '') for p in params]
    optimizer.param_groups[:] = merged.values()
    return MergedGroups(before, origins, [list(g['param_names']) for g in merged.values()])


def require_trained_groups(optimizer: torch.optim.Optimizer) -> None:
    """Refuses, for ZeRO stages 1 and 2, groups without a trained parameter.

    Raises ConfigError for the first of them. Call it after `merge_param_groups`.
    """
    for group in optimizer.param_groups:
        if not any(p.requires_grad for p in group['params']):
            raise ConfigError(
                f'a parameter group holds only frozen parameters ({few(group["param_names"])}), '
                'which ZeRO stages 1 and 2 cannot cut up: build the groups of parameters that '
                'require a gradient only, or use ZeRO stage 0 or 3'
            )


def remap_scheduler(lr_scheduler: Any, origins: list[int], groups_before: int) -> None:
    """Adapts a scheduler of the old groups to the merged ones, in place.

    Args:
        lr_scheduler: one of timm's or torch's, which keep lists with one entry per group.
        origins: as in `MergedGroups`.
        groups_before: how many groups there were when the scheduler was built.
    """
    for name in PER_GROUP_LISTS:
        values = getattr(lr_scheduler, name, None)
        if isinstance(values, list) and len(values) == groups_before:
            setattr(lr_scheduler, name, [values[i] for i in origins])


def _exact(value: Any) -> str:
    """A text that is the same for equal values only; repr of a tensor rounds."""
    return repr(value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value)
