"""A torch optimizer's state dict, whose keys are numbers, and the same by parameter name."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from internvl_ds.engine.optimizer_trial import NUMBER, form_of
from internvl_ds.errors import CheckpointMismatch, few
from internvl_ds.zero.lazy_tensor import Flat


class State(NamedTuple):
    """What an optimizer keeps, by the parameters' names; see `NamedState`."""

    masters: dict[str, Flat]
    moments: dict[str, dict[str, Flat]]
    steps: dict[str, dict[str, float]]
    settings: dict[str, Mapping[str, Any]]
    unnamed: str = ''


class KeptTensor(NamedTuple):
    """What a state dict holds of one of its optimizer's tensors.

    Attributes:
        state: key -> value; empty where there is none.
        settings: of the group that it was in.
    """

    state: Mapping[str, Any]
    settings: Mapping[str, Any]


def kept_tensors(optimizer: Mapping[str, Any]) -> list[KeptTensor]:
    """What a torch optimizer's state dict holds, in the order of its groups."""
    tensors = []
    for group in optimizer.get('param_groups', []):
        settings = {k: v for k, v in group.items() if k not in ('params', 'param_names')}
        tensors += [KeptTensor(optimizer['state'].get(k, {}), settings) for k in group['params']]
    return tensors


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

    Raises:
        CheckpointMismatch: when the groups are others, or the parameters are in another order.
    """
    saved = [group['params'] for group in optimizer.get('param_groups', [])]
    tensors = kept_tensors(optimizer)
    if [len(group) for group in saved] != [len(group) for group in groups]:
        raise CheckpointMismatch(
            f'{where}: its optimizer has {len(saved)} parameter groups with '
            f'{few([len(g) for g in saved])} tensors, and this run has {len(groups)} with '
            f'{few([len(g) for g in groups])}'
        )
    names = list(itertools.chain.from_iterable(groups))
    gaps = [name for name in names if name not in weights]
    if gaps:
        raise CheckpointMismatch(
            f'{where}: {len(gaps)} parameters of the optimizer are not in it: {few(gaps)}'
        )
    result, unnamed = State({}, {}, {}, {}), ''
    for index, (name, (state, settings)) in enumerate(zip(names, tensors, strict=True)):
        result.masters[name] = Flat.of(
            f'{where}: {name}', weights[name] if masters is None else masters[index].detach()
        )
        result.moments[name], result.steps[name], other = split(where, name, state)
        unnamed = unnamed or other
        result.settings[name] = settings
    _require_same_order(where, result, weights)
    return result._replace(unnamed=unnamed)


def split(
    where: str, name: str, state: Mapping[str, Any]
) -> tuple[dict[str, Flat], dict[str, float], str]:
    """Splits an optimizer's state of a parameter into tensors, numbers, and the rest.

    Args:
        where, name: the checkpoint's path and the parameter, for errors.
        state: key -> value.
    """
    tensors, numbers, other = {}, {}, ''
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim():
            tensors[key] = Flat.of(f'{where}: {key} of {name}', value)
        elif value is not None and form_of(value) == NUMBER:
            numbers[key] = float(value)
        elif value is not None:
            other = other or f'{key} of {name} is a {type(value).__name__}'
    return tensors, numbers, other


def _require_same_order(where: str, result: State, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuses parameters in another order: their tensors have swapped shapes."""
    shapes = {name: weights[name].shape for name in result.masters}
    kinds = {n: {flat.shape for flat in moments.values()} for n, moments in result.moments.items()}
    has_one_each = all(len(kind) <= 1 for kind in kinds.values())
    counts = Counter(shape for kind in kinds.values() for shape in kind)
    # Else the state has not a number for each element: Adafactor's, of rows and columns.
    is_by_element = has_one_each and counts <= Counter(shapes.values())
    for index, (name, shape) in enumerate(shapes.items()):
        tensors = result.moments[name] if is_by_element else {}
        for what, flat in (('the master', result.masters[name]), *tensors.items()):
            if flat.shape != shape:
                raise CheckpointMismatch(
                    f'{where}: {what} of parameter {index} has shape {tuple(flat.shape)}, and '
                    f'{name} has {tuple(shape)}: the parameters are in another order'
                )
