"""Muon's update of flat parts: momentum where it lies, orthogonalised where a matrix is whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from internvl_ds.errors import ConfigError
from internvl_ds.zero.muon.exchange import Round, shared_out
from internvl_ds.zero.muon.routing import MEMBERSHIP, fault_of_matrices, is_suitable, route_of
from internvl_ds.zero.partition import Layout, shapes_of

# With these a step of the class moves a tensor of zeros by the update alone.
_BARE: dict[str, Any] = {'weight_decay': 0.0, 'momentum': 0.0, 'nesterov': False}


def movement(optimizer: Any, group: Mapping[str, Any], update: torch.Tensor) -> torch.Tensor:
    """How far a step moves a whole matrix beside weight decay, by the optimizer's own class.

    That is the orthogonalised update, times lr and what the class makes of the shape. It takes the
    memory of three matrices more in their dtype, and of some four in bfloat16.

    Args:
        optimizer: timm's or torch's Muon.
        group: its settings.
        update: momentum and gradient, in the shape of the matrix.
    """
    matrix = torch.zeros_like(update)
    matrix.grad = update
    settings = {k: v for k, v in group.items() if k not in MEMBERSHIP}
    type(optimizer)([{**settings, **_BARE, 'params': [matrix]}]).step()
    return matrix


def step_flat(
    group: Mapping[str, Any],
    flat: torch.Tensor,
    state: MutableMapping[str, Any],
    orthogonalise: Callable[[torch.Tensor], None],
) -> None:
    """Takes Muon's step of a part of a group, from its ``.grad``.

    It takes the memory of the part once more.

    Args:
        group: its settings.
        flat: weights, one after the other.
        state: that the optimizer keeps for them.
        orthogonalise: replaces momentum and gradient by `movement`.
    """
    gradient, momentum = flat.grad, group['momentum']
    assert gradient is not None
    if 'use_muon' in group:
        state['use_muon'] = True
    if 'momentum_buffer' not in state:
        state['momentum_buffer'] = torch.zeros_like(flat)
    buffer = state['momentum_buffer']
    buffer.lerp_(gradient, 1 - momentum)
    update = gradient.lerp(buffer, momentum) if group['nesterov'] else buffer.clone()
    orthogonalise(update)
    flat.mul_(1 - group['lr'] * group['weight_decay'])
    flat.add_(update)


class MuonParts:
    """Steps those groups of a Muon whose matrices ZeRO has cut up. It does not keep the Muon alive.

    Args:
        client: timm's or torch's Muon, over the flat tensors.
        slots: each flat tensor of this rank, with its group.
        layout: whose groups these are, in order.
        own_rank: of the layout.
        device: the engine's.

    Raises:
        ConfigError: for a group that cannot be stepped so.
    """

    def __init__(
        self,
        client: Any,
        slots: Sequence[tuple[dict[str, Any], torch.Tensor]],
        layout: Layout,
        own_rank: int,
        device: torch.device,
    ) -> None:
        self._shapes, self._device = shapes_of(layout), device
        _route(client, [group for group, _ in slots], layout)
        # By flat tensor; each stays the same object as long as the engine lives.
        self._rounds: dict[int, list[Round]] = {
            id(flat): [Round(layout, own_rank, owners) for owners in shared_out(layout, index)]
            for index, (group, flat) in enumerate(slots)
            if route_of(client, group)
        }

    @torch.no_grad()
    def step(self, client: Any, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Steps the matrices in some of the client's groups. Collective: every rank calls it.

        Returns:
            The groups that the client steps by itself.
        """
        rest = []
        for group in groups:
            flats = [flat for flat in group['params'] if id(flat) in self._rounds]
            for flat in flats:
                self._step(client, group, flat)
            if not flats:
                rest.append(group)
        return rest

    def _step(self, client: Any, group: dict[str, Any], flat: torch.Tensor) -> None:
        def work(name: str, update: torch.Tensor) -> None:
            whole = update.view(self._shapes[name])
            update.copy_(movement(client, group, whole).view(-1))

        def orthogonalise(update: torch.Tensor) -> None:
            for each in self._rounds[id(flat)]:
                each.replace(update, work, self._device)

        step_flat(group, flat, client.state[flat], orthogonalise)


def _route(client: Any, groups: Sequence[dict[str, Any]], layout: Layout) -> None:
    """States in each group whether it is orthogonalised; see `divided`."""
    shapes: dict[int, list[Sequence[int]]] = {}
    for group, of_part in zip(groups, layout.groups, strict=True):
        shapes.setdefault(id(group), []).extend(of_part.values())
    for group in {id(group): group for group in groups}.values():
        if route_of(client, group) is None:
            routes = {is_suitable(shape) for shape in shapes[id(group)]}
            if len(routes) > 1:
                raise ConfigError(
                    f'a parameter group of {type(client).__name__} has matrices and other tensors, '
                    'of which ZeRO has made one flat tensor: make the engine with '
                    'internvl_ds.initialize, which divides it, or use two groups, the other with '
                    'use_fallback True'
                )
            group['use_muon'] = routes.pop()
        fault = fault_of_matrices(group, shapes[id(group)]) if route_of(client, group) else ''
        if fault:
            raise ConfigError(f'{type(client).__name__} at ZeRO stages 1 to 3: {fault}')
