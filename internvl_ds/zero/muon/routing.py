"""Which tensors Muon orthogonalises, by the rule of its own class. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

# Of a parameter group: which tensors it holds, as opposed to how they are trained.
MEMBERSHIP = frozenset({'params', 'param_names', 'names', 'name'})

_TORCH: Any = getattr(torch.optim, 'Muon', None)  # since torch 2.9


def is_muon(optimizer: Any) -> bool:
    """Whether an optimizer is timm's Muon or torch's, and no subclass: its step may be another."""
    kind = type(optimizer)
    of_timm = (kind.__module__, kind.__qualname__) == ('timm.optim.muon', 'Muon')
    return of_timm or kind is _TORCH


def route_of(optimizer: Any, group: Mapping[str, Any]) -> bool | None:
    """Whether a Muon orthogonalises the tensors of a group; timm's may step others as AdamW.

    Returns:
        None where timm's decides by each tensor's shape.
    """
    if type(optimizer) is _TORCH:
        return True
    if group.get('use_fallback', False):
        return False
    return bool(group['use_muon']) if 'use_muon' in group else None


def routes_of(optimizer: Any, group: Mapping[str, Any]) -> list[dict[str, bool]]:
    """The entries that state a group's possible routes; ``[{}]`` where nothing needs to be said."""
    is_open = is_muon(optimizer) and route_of(optimizer, group) is None
    return [{'use_muon': True}, {'use_muon': False}] if is_open else [{}]


def divided(optimizer: Any, group: Mapping[str, Any]) -> list[tuple[dict[str, bool], list[Any]]]:
    """Divides a group's parameters by route: ZeRO makes one flat tensor of a group.

    A flat tensor has one dimension, from which the class could not tell the route any more. A
    frozen parameter, which ZeRO leaves out, goes where trained ones are.

    Returns:
        (entries for the group that state the route, parameters); one for any other optimizer.
    """
    parameters = group['params']
    if routes_of(optimizer, group) == [{}]:
        return [({}, parameters)]
    from internvl_ds.zero.parameters import whole_shape  # imports DeepSpeed

    suits = [is_suitable(whole_shape(p)) for p in parameters]
    trained = {suit for suit, p in zip(suits, parameters, strict=True) if p.requires_grad}
    if len(trained) == 1:
        suits = [*trained] * len(suits)
    by_route: dict[bool, list[Any]] = {suit: [] for suit in suits}
    for suit, parameter in zip(suits, parameters, strict=True):
        by_route[suit].append(parameter)
    return [({'use_muon': route}, members) for route, members in by_route.items()]


def is_suitable(shape: Sequence[int]) -> bool:
    """Whether timm's Muon orthogonalises a tensor of a shape."""
    from timm.optim.muon import _is_suitable_for_muon

    return bool(_is_suitable_for_muon(torch.empty(tuple(shape), device='meta')))


def fault_of_matrices(group: Mapping[str, Any], shapes: Iterable[Sequence[int]] = ()) -> str:
    """Why a group cannot be orthogonalised at ZeRO stages 1 to 3; '' if it can.

    Args:
        group: whose route is Muon.
        shapes: of its tensors.
    """
    algorithm = group.get('algo', 'muon')
    if algorithm != 'muon':
        return (
            f'its algo {algorithm!r} keeps squares of whole orthogonalised matrices; use muon or '
            "nmuon of timm's, or stage 0"
        )
    odd = next((tuple(shape) for shape in shapes if len(shape) < 2), None)
    if odd is not None:
        return (
            f'a parameter of shape {odd} is in a group with use_muon True, and is no matrix; give '
            'it a group with use_fallback True'
        )
    return ''
