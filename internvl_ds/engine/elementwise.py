"""Finds by trial whether ZeRO steps an optimizer right, in pieces and on several ranks."""

from __future__ import annotations

import copy
import math
import random
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from internvl_ds.engine.optimizer_trial import OF_DEEPSPEED, apart, copy_of, texts_of
from internvl_ds.errors import ConfigError
from internvl_ds.zero.muon.routing import fault_of_matrices, is_muon, route_of, routes_of
from internvl_ds.zero.muon.step import movement, step_flat
from internvl_ds.zero.wrapper import only_groups

_UPDATES = 3

# Matrices, because Muon takes nothing else. Small ones come first: products of larger ones, as Kron
# makes them, fill the memory. From the other sides every known optimizer factors its state.
_MATRICES = (((6, 10), (10, 12)), ((128, 130), (130, 160)))
# An optimizer that takes no matrices, or no float64, is tried on the next.
_FORMS: tuple[tuple[Sequence[Any], torch.dtype], ...] = (
    (_MATRICES, torch.float64),
    (_MATRICES, torch.float32),
    ((((50,), (30,)),), torch.float32),
)
# Of the distance moved. In float64 the sums of both forms agree far better than LARS's small steps
# differ.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}

_OTHERS = 'depends on other elements, and ZeRO gives it flat pieces of many tensors'
_NEAREST = 'use stage 0, or an optimizer such as AdamW, SGD or Lion'
_MUON = "use timm's (TRAIN.OPTIMIZER.NAME muon or nmuon) or torch's Muon, or stage 0"

# Of an optimizer, by settings and how it is stepped: it is asked when it is given to `initialize`,
# and again with DeepSpeed's around it.
_faults: weakref.WeakKeyDictionary[Any, dict[Any, str]] = weakref.WeakKeyDictionary()


def require_steps(optimizer: Any, stage: int, ranks: int, device: torch.device) -> None:
    """Refuses an optimizer that an engine of a ZeRO stage would step with wrong numbers.

    At stages 1 to 3 it gets flat pieces in which many tensors lie, or parts of them: LAMB's and
    LARS's norms, Adafactor's rows and columns, the mean of a cautious mask would be others, and
    training would go on. The matrices of timm's and torch's Muon are stepped whole there (see
    `MuonParts`); their class is tried as well, which may be of another version. At each stage
    ``step()`` is called without a closure and without a graph of the gradients, and ranks must draw
    no random numbers of their own.

    Args:
        optimizer: of the client, or made from the ds_config; it is not changed.
        stage: of ZeRO.
        ranks: how many there are.
        device: where it is tried.

    Raises ConfigError, which names its class, the stage, and what works.
    """
    fault = fault_of(optimizer, stage, ranks, device)
    if fault:
        raise ConfigError(f'{type(optimizer).__name__} at ZeRO stage {stage}: {fault}')


def fault_of(optimizer: Any, stage: int, ranks: int, device: torch.device) -> str:
    """As `require_steps`, as a text: the fault and what works; '' if there is no fault."""
    if stage and isinstance(optimizer, torch.optim.Adagrad):
        return (
            'DeepSpeed makes another one of its defaults in its place, which no parameter group '
            'and no lr schedule reaches; use stage 0, or AdamW'
        )
    if type(optimizer).__module__.startswith('deepspeed.'):
        if stage and 'Muon' in type(optimizer).__name__:
            return f'it orthogonalises gradients before their norm is taken; {_MUON}'
        if stage and type(optimizer).__name__ not in OF_DEEPSPEED:
            return f'its update of an element {_OTHERS}; {_NEAREST}'
        return ''
    faults = _faults.setdefault(optimizer, {})
    for group, route in ((g, r) for g in optimizer.param_groups for r in routes_of(optimizer, g)):
        settings = {**group, **route} if stage else group
        key = (texts_of(settings), stage > 0, ranks > 1, device)
        if key not in faults:
            faults[key] = _fault_of_group(optimizer, settings, stage, ranks, device)
        if faults[key]:
            return faults[key]
    return ''


def _fault_of_group(
    optimizer: Any, settings: Mapping[str, Any], stage: int, ranks: int, device: torch.device
) -> str:
    if stage and _has_matrices(optimizer, settings) and (fault := fault_of_matrices(settings)):
        return fault
    of_python = random.getstate()
    error: Exception | None = None
    with apart(device):
        try:
            for sizes, dtype in _FORMS:
                try:
                    for shapes in sizes if stage else sizes[:1]:
                        trial = _Trial(optimizer, settings, shapes, dtype, device)
                        if fault := trial.fault(stage, ranks):
                            return fault
                    return ''
                except Exception as failure:
                    if isinstance(failure, _NoCopyError) and not stage:
                        return ''  # not known; it would be stepped as in plain PyTorch
                    error = error or failure
        finally:
            random.setstate(of_python)
    words = ' '.join(str(error).split())[:120]
    return (
        f'a trial of its step() fails ({type(error).__name__}: {words}); an engine gives it no '
        'closure, and dense gradients without a graph; use an optimizer such as AdamW, SGD or Lion'
    )


def _has_matrices(optimizer: Any, settings: Mapping[str, Any]) -> bool:
    return is_muon(optimizer) and bool(route_of(optimizer, settings))


class _NoCopyError(Exception):
    """The optimizer has attributes that cannot be copied."""


class _Trial:
    """An optimizer's updates of a few tensors: whole, and as ZeRO gives them to two ranks."""

    def __init__(
        self,
        optimizer: Any,
        settings: Mapping[str, Any],
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._optimizer, self._settings = optimizer, settings
        self._tolerance = _TOLERANCE[dtype]
        self._weights, self._gradients = [], []
        for size, shape in enumerate(shapes, 1):
            count = torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64, device=device)
            weight = size * count.sin()
            # At right angles to the weights, where AdamP and SGDP do more than Adam and SGD; signs
            # change from update to update, where cautious ones hold elements back.
            across = torch.stack([weight[1::2], -weight[0::2]], 1) / 10**size
            turns = [
                (across * (count[: len(across), None] * n).cos()) for n in range(1, 1 + _UPDATES)
            ]
            self._weights.append(weight.reshape(shape).to(dtype))
            self._gradients.append([turn.reshape(shape).to(dtype) for turn in turns])

    def fault(self, stage: int, ranks: int) -> str:
        whole = self._after(self._weights, self._gradients)
        is_shared = ranks > 1 or stage > 0
        if is_shared and self._differ(whole, self._after(self._weights, self._gradients)):
            return (
                'it draws random numbers, others on each rank, so that the ranks would train '
                'weights of their own; use one rank at stage 0, or an optimizer such as AdamW'
            )
        is_whole = _has_matrices(self._optimizer, self._settings)
        if stage and self._differ(whole, self._by_matrix() if is_whole else self._in_pieces()):
            return f'its update of an element {_OTHERS}; {_NEAREST}'
        return ''

    def _differ(self, whole: list[torch.Tensor], other: list[torch.Tensor] | None) -> bool:
        if other is None:
            return True
        pairs = zip(whole, other, self._weights, strict=True)
        return any(
            not (one - two).abs().max() <= self._tolerance * (one - start.flatten()).abs().max()
            for one, two, start in pairs
        )

    def _in_pieces(self) -> list[torch.Tensor] | None:
        """The weights as two ranks hold them; None if the optimizer takes no pieces, as Muon."""
        halves: list[list[torch.Tensor]] = []
        for part in (0, 1):

            def piece(tensor: torch.Tensor, part: int = part) -> torch.Tensor:
                cut = tensor.numel() * 2 // 5
                return tensor.flatten()[:cut] if part == 0 else tensor.flatten()[cut:]

            gradients = [[piece(turn) for turn in turns] for turns in self._gradients]
            try:
                halves.append(self._after([piece(w) for w in self._weights], gradients, True))
            except Exception:
                return None
        return [torch.cat(pair) for pair in zip(*halves, strict=True)]

    def _by_matrix(self) -> list[torch.Tensor]:
        """The weights as `MuonParts` steps them, on one rank."""
        groups = self._groups([weight.flatten() for weight in self._weights], {})
        for group, weight, turns in zip(groups, self._weights, self._gradients, strict=True):
            (flat,) = group['params']
            state: dict[str, Any] = {}

            def orthogonalise(
                update: torch.Tensor, group: Any = group, shape: torch.Size = weight.shape
            ) -> None:
                update.copy_(movement(self._optimizer, group, update.view(shape)).view(-1))

            for turn in turns:
                flat.grad = turn.flatten()
                with torch.no_grad():
                    step_flat(group, flat, state, orthogonalise)
        return [group['params'][0].detach() for group in groups]

    def _groups(
        self, weights: Sequence[torch.Tensor], memo: dict[int, Any]
    ) -> list[dict[str, Any]]:
        """A group of the same settings for each tensor; ``memo`` as of `copy_of`."""
        parameters = [nn.Parameter(weight.clone()) for weight in weights]
        olds = [p for group in self._optimizer.param_groups for p in group['params']]
        memo.update({id(p): parameters[0] for p in olds})
        groups = []
        for parameter in parameters:
            own = {k: v for k, v in self._settings.items() if k != 'params'}
            group = copy.deepcopy(own, dict(memo))
            # A warm-up begins with 0, with which nothing moves.
            lr = group.get('lr')
            group['lr'] = torch.full_like(lr, 0.01) if torch.is_tensor(lr) else 0.01
            groups.append({**group, 'params': [parameter]})
        return groups

    def _after(
        self,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[Sequence[torch.Tensor]],
        by_group: bool = False,
    ) -> list[torch.Tensor]:
        """The weights, flat, after some updates of a copy of the optimizer with a group for each.

        Args:
            weights: one tensor a group.
            gradients: of each tensor, by update.
            by_group: whether the groups are stepped one by one, as `ZeroOptimizer` does.
        """
        memo: dict[int, Any] = {}
        groups = self._groups(weights, memo)
        parameters = [group['params'][0] for group in groups]
        try:
            trial = copy_of(self._optimizer, groups, memo)
        except Exception as error:
            raise _NoCopyError(f'no copy of it can be made: {error}') from error
        for update in range(_UPDATES):
            for parameter, turns in zip(parameters, gradients, strict=True):
                parameter.grad = turns[update].clone()
            for some in [[group] for group in groups] if by_group else [groups]:
                with only_groups(trial, some):
                    type(self._optimizer).step(trial)
        return [parameter.detach().flatten() for parameter in parameters]
