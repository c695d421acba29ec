"""Parameters without a gradient in an update: plain PyTorch leaves them alone.

DeepSpeed gives them a gradient of zero, with which weight decay and momentum move them on, and an
optimizer counts an update. At stage 0 that gradient is taken away again, so that they train as in
DistributedDataParallel(find_unused_parameters=True). At stages 1 to 3, where the optimizer steps
flat tensors of many parameters, the update is refused where it would make a difference.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from internvl_ds.dist.group import current_group
from internvl_ds.dist.rendezvous import connection, exchange, world_size
from internvl_ds.errors import ConfigError, few
from internvl_ds.zero.parameters import whole_numel
from internvl_ds.zero.passes.effect import ZeroEffect
from internvl_ds.zero.wrapper import Wrapper

_WHAT = 'unused parameters'


class Unused:
    """Refuses gradients of zero, at stages 1 to 3, where they are not as none."""

    def __init__(self, wrapper: Wrapper, effect: Callable[[Any, Any], ZeroEffect]) -> None:
        """``effect``: that of a client's optimizer with the settings of a parameter group."""
        self._wrapper, self._effect = wrapper, effect
        self._all = set(self._trained().values())

    def require(self, used: set[str]) -> None:
        """Refuses an update, before it is applied, on all ranks alike.

        Args:
            used: names of the parameters to which its backwards gave a gradient; the same on all
                ranks, see `Agreement`.

        Raises:
            ConfigError: naming the parameters.
        """
        wrapper = self._wrapper
        if not wrapper.idle and used >= self._all:
            return
        trained = self._trained()
        # What was unfrozen after `initialize` is in no group.
        unused = {*trained.values()} & wrapper.trained_names() - used
        effects = []
        for group, parameters in zip(wrapper.client.param_groups, wrapper.groups(), strict=True):
            names = {trained[p] for p in parameters if p in trained}
            if names & (unused | (wrapper.idle or set())):
                effect = self._effect(wrapper.client, group)
                never = effect.never or group.get('lr') == 0
                effects.append((names, effect._replace(never=never)))
        if all(all(effect) for _, effect in effects):
            return  # they are as none whatever was before
        if unused != wrapper.idle and not _is_finite(wrapper):
            return  # it will be skipped
        if wrapper.idle is None:
            wrapper.idle = _without_state(wrapper, unused)
        idle, late, rare = wrapper.idle & unused, wrapper.idle - unused, unused - wrapper.idle
        moved, at_times = [], []
        for names, effect in effects:
            moved += sorted(names & idle) if not effect.never else []
            at_times += sorted(names & late) if not effect.late else []
            at_times += sorted(names & rare) if not effect.at_times else []
        if moved or at_times:
            raise ConfigError(self._message(moved, at_times))
        wrapper.idle = idle

    def _trained(self) -> dict[torch.Tensor, str]:
        pairs = self._wrapper.names.items()
        return {p: name for p, name in pairs if p.requires_grad and whole_numel(p)}

    def _message(self, moved: list[str], at_times: list[str]) -> str:
        kind = type(self._wrapper.client).__name__
        what = 'no gradient in any update'
        way_out = 'Call requires_grad_(False) of them before initialize'
        if at_times:
            what = 'a gradient in some updates only'
            way_out = 'Use them in each update, if only times 0'
        return (
            f'{few(at_times or moved)}: {what}. Plain PyTorch leaves a parameter alone then; at '
            f'ZeRO stage {self._wrapper.stage} DeepSpeed gives it a gradient of zero, and {kind} '
            f'with these settings moves it by weight decay, momentum or its count of updates. '
            f'{way_out}, or train at ZeRO stage 0'
        )


def restore_idle(wrapper: Wrapper, names: Iterable[str] | None) -> None:
    """Takes over the parameters that no update of the saved run had given a gradient.

    Args:
        wrapper: at stages 1 to 3 it knows them again; at stage 0 their state begins anew, as in
            plain PyTorch.
        names: None where they are not known.
    """
    if names is None:
        return
    if wrapper.partitioned:
        wrapper.idle = set(names)
        return
    masters = wrapper.masters()
    for name in masters.keys() & set(names):
        wrapper.inner.state.pop(masters[name], None)


def _is_finite(wrapper: Wrapper) -> bool:
    """Whether all gradients are, on all ranks. Collective: every rank calls it."""
    parts = (wrapper.owned_gradients() or {}).values()
    is_finite = all(bool(torch.isfinite(part).all()) for part in parts)
    return all(exchange('finite gradients', is_finite, _limit()))


def _without_state(wrapper: Wrapper, names: set[str]) -> set[str]:
    """The parameters of which the optimizer has kept nothing but zeros on any rank.

    No gradient has moved it, in this run or in one that this goes on with. Collective: every rank
    calls it.
    """
    layout, rank = wrapper.partitioning()
    state, masters = wrapper.inner.state, list(wrapper.masters().values())
    moved = set()
    for name in sorted(names):
        for place in layout.places(name):
            if place.rank == rank:
                master, end = masters[place.group], place.offset + place.stop - place.start
                values = [v for v in state.get(master, {}).values() if torch.is_tensor(v)]
                whole = [v.view(-1) for v in values if v.numel() == master.numel()]
                if any(value[place.offset : end].any() for value in whole):
                    moved.add(name)
    return names.difference(*exchange('state of unused parameters', sorted(moved), _limit()))


class LeaveOut:
    """Takes the zero gradients of stage 0 away from parameters that no rank used."""

    def __init__(self, wrapper: Wrapper) -> None:
        """Collective: every rank calls it."""
        self._wrapper = wrapper
        self._unused: list[str] = []  # on this rank, in the update that runs
        # The gradients that DeepSpeed has made for them.
        self._made: dict[str, tuple[torch.Tensor, int]] = {}
        self._frozen = self._frozen_now()  # in the last update
        self._places: list[str] = []  # where this rank has brought them, in the last two
        engine = wrapper.engine
        reduce, ref = type(engine).allreduce_gradients, weakref.ref(engine)

        def look_and_reduce(*args: Any, **kwargs: Any) -> Any:
            engine = ref()
            assert engine is not None
            if not engine.is_gradient_accumulation_boundary():
                return reduce(engine, *args, **kwargs)
            with self._thawed():
                self._look()
                result = reduce(engine, *args, **kwargs)
                self._note()
            return result

        engine.allreduce_gradients = look_and_reduce
        if world_size() > 1:
            connection(_WHAT, _limit())  # later one rank alone may ask for it

    @contextmanager
    def _thawed(self) -> Iterator[None]:
        """Around the reduction: what was frozen since the last one, and may have gradients of it.

        DeepSpeed does not reduce what is frozen, and each rank would apply its own.
        """
        before, self._frozen = self._frozen, self._frozen_now()
        late = [p for p in self._frozen if p not in before or p.grad is not None]
        if late:
            trained, names = self._wrapper.trained_names(), self._wrapper.names
            late = [p for p in late if names[p] in trained]
        for parameter in late:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in late:
                parameter.requires_grad_(False)

    def _frozen_now(self) -> set[torch.Tensor]:
        return {p for p in self._wrapper.names if not p.requires_grad}

    def _look(self) -> None:
        """Before gradients are reduced: tells the other ranks which this rank lacks, if any."""
        made, self._made = self._made, {}  # by another backward of this update, it may be
        self._unused = [
            name
            for p, name in self._wrapper.names.items()
            if p.requires_grad
            and p.numel()
            and (p.grad is None or _is_untouched(p.grad, made.get(name)))
        ]
        group = current_group()
        group.rounds[_WHAT] += 1  # on each rank
        if not self._unused or world_size() == 1:
            return
        peers = connection(_WHAT, limit := _limit())
        # Two back: to reduce the last one's gradients, all ranks had ended the update before it.
        for old in self._places[:-1]:
            peers.leave(old)
        place = group.key(f'{_WHAT}/{group.rounds[_WHAT]}')
        self._places = [*self._places[-1:], place]
        peers.bring(place, self._unused, time.monotonic() + limit)

    def _note(self) -> None:
        """After gradients are reduced, which is seen in no version."""
        unused = set(self._unused)
        self._made = {
            name: (p.grad, p.grad._version)
            for p, name in self._wrapper.names.items()
            if name in unused and p.grad is not None
        }

    def apply(self) -> None:
        """Before the client's step. A rank that lacks none knows that each was used."""
        unused, self._unused, self._made = set(self._unused), [], {}
        if unused and world_size() > 1:
            get_accelerator().synchronize()  # all have reduced, so all have said what they lack
            deadline = time.monotonic() + (limit := _limit())
            lists = connection(_WHAT, limit).brought(self._places[-1], deadline)
            unused = set.intersection(*map(set, lists)) if lists else set()
        if unused:
            masters = self._wrapper.masters()
            for name in unused & masters.keys():
                masters[name].grad = None


def _is_untouched(gradient: torch.Tensor, made: tuple[torch.Tensor, int] | None) -> bool:
    """Whether a gradient is one that was made, and no backward has added to it."""
    return made is not None and gradient is made[0] and gradient._version == made[1]


def _limit() -> float:
    return current_group().limit('TIMEOUT')
