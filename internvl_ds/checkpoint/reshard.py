"""Writes state by parameter name into the running partitioning, from any saved layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.checkpoint.optimizer_state import RunningOptimizer, SavedTensor
from internvl_ds.checkpoint.restore import model_shapes, require_same_model
from internvl_ds.engine.optimizer_trial import (
    NUMBER,
    forms_of,
    like,
    starts_with_zeros,
)
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.errors import CheckpointError, CheckpointMismatch, few
from internvl_ds.zero.lazy_tensor import Flat, NamedState, fill
from internvl_ds.zero.parameters import is_sharded, local_values, own_slice
from internvl_ds.zero.partition import Layout, owned, shapes_of


class Restorer:
    """Maps a saved state onto a running engine.

    Making one reads and checks; only `restore` changes anything. Every rank makes its own.
    """

    def __init__(self, engine: DeepSpeedEngine, state: NamedState) -> None:
        """Checks that all of the running state is in the checkpoint, and can be read.

        Raises:
            CheckpointMismatch: for another model, other trained parameters, another optimizer or
                parameter groups that cannot share a step; names the first that differ.
            CheckpointError: when a shard cannot be read.
        """
        self.engine, self.wrapper = engine, wrapper_of(engine)
        state.require_all_named()
        optimizer = RunningOptimizer(self.wrapper.client)
        weights = state.weights()
        shapes = {name: tuple(flat.shape) for name, flat in weights.items()}
        require_same_model(shapes, model_shapes(engine.module), state.where)
        self.layout, self.rank = self.wrapper.partitioning()
        self.state = state = _with_frozen(state, engine, self.layout)
        self.masters = list(self.wrapper.masters().values())
        _require_same_trained(state, self.layout)
        _require_known_layout(self.layout, self.rank, self.masters)
        self.fragments = owned(self.layout, self.rank)
        self.groups = self._groups_of_masters()
        self.warnings = self._require_same_optimizer(optimizer)
        self.trials = list(map(optimizer.kept, self.groups, self.masters))
        self._begin_unused()
        self.keys = [self._keys_of_group(index) for index in range(len(self.masters))]
        self.steps = [self._steps_of_group(index) for index in range(len(self.masters))]
        self.counters = self._counters()
        self.fixed = list(_untrained_tensors(engine, weights, self.layout))
        for fragments in self.fragments:
            for name, place in fragments:
                # Opens what `restore` will read.
                state.masters[name].pieces(place.start, place.stop)
                for key, flat in state.moments[name].items():
                    is_whole = self._whole_shape(name, key) is not None
                    flat.pieces(*((0, flat.numel) if is_whole else (place.start, place.stop)))

    @torch.no_grad()
    def restore(self) -> None:
        """Sets weights, optimizer state and counters. Collective: every rank calls it."""
        self.wrapper.release_gathered()
        self.wrapper.idle = self.unused or None
        for target, flat, slice_of in self.fixed:
            if slice_of is None:
                target.data.copy_(flat.whole())
            else:
                flat.copy_to(target[: slice_of[1] - slice_of[0]], slice_of[0])
        state = self.wrapper.inner.state
        for index, master in enumerate(self.masters):
            fill(master.data, self.fragments[index], self.state.masters)
            self._restore_group_state(index, master, state)
        for group, counts in self.counters:
            group.update(counts)
        self.wrapper.push_masters()
        counters = self.state.counters
        self.engine.global_steps = counters.get('global_steps', 0)
        self.engine.skipped_steps = counters.get('skipped_steps', 0)
        self.engine.global_samples = counters.get(
            'global_samples', self.engine.global_steps * self.engine.train_batch_size()
        )

    def _restore_group_state(self, index: int, master: Any, state: Any) -> None:
        keys, steps = self.keys[index], self.steps[index]
        if not keys and not steps:  # saved before the first update
            state.pop(master, None)
            return
        before = state[master]
        for key in keys:
            moments = {n: self.state.moments[n][key] for n in self.layout.groups[index]}
            shape = self._whole_shape(next(iter(moments)), key) or master.shape
            tensor = before.get(key)
            if not isinstance(tensor, torch.Tensor) or tensor.shape != shape:
                before[key] = torch.zeros(shape, dtype=master.dtype, device=master.device)
            if shape == master.shape:
                fill(before[key], self.fragments[index], moments)
            else:
                before[key].copy_(next(iter(moments.values())).whole())
        trial = self.trials[index]
        for key, number in steps.items():
            before[key] = like(number, trial.numbers.get(key) if trial else None)

    def _groups_of_masters(self) -> list[dict[str, Any]]:
        """For each master, the group of the optimizer that it is in."""
        slots = self.wrapper.slots()
        if self.wrapper.partitioned:
            return [group for group, _ in slots]
        groups = {id(tensor): group for group, tensor in slots}
        return [groups[id(master)] for master in self.masters]

    def _require_same_optimizer(self, optimizer: RunningOptimizer) -> list[str]:
        state, comparisons = self.state, []
        for index, (group, master) in enumerate(zip(self.groups, self.masters, strict=True)):
            for name, shape in self.layout.groups[index].items():
                forms = forms_of({**state.steps[name], **state.moments[name]}, shape)
                settings = state.settings.get(name, {})
                comparisons.append((SavedTensor([name], forms, settings), group, master))
        return optimizer.require_saved_by(state.where, state.optimizer, state.fresh, comparisons)

    def _whole_shape(self, name: str, key: str) -> torch.Size | None:
        """The shape of state that has not a number for each element of its parameter."""
        shape = self.state.moments[name][key].shape
        return None if shape == self.state.masters[name].shape else shape

    def _begin_unused(self) -> None:
        """Gives zeros to parameters of which a tag of stage 0 has no state, as of a first update.

        Plain PyTorch has none where no gradient came, and a group is one to the optimizer now.
        Where its first state is another, the group is refused.
        """
        moments, steps, unused = dict(self.state.moments), dict(self.state.steps), set()
        for names, settings in zip(self.layout.groups, self.groups, strict=True):
            known = [n for n in names if moments[n] or steps[n]]
            blank = [n for n in names if n not in known]
            if known and blank and starts_with_zeros(self.wrapper.client, settings):
                unused.update(blank)
                for name in blank:
                    zeros = torch.zeros(()).expand(self.state.masters[name].shape)
                    moments[name] = dict.fromkeys(moments[known[0]], Flat.of(name, zeros))
                    steps[name] = steps[known[0]]
        self.state = replace(self.state, moments=moments, steps=steps)
        self.unused = unused

    def _keys_of_group(self, index: int) -> list[str]:
        """The tensors that the optimizer keeps for a group, which is one to it."""
        names = list(self.layout.groups[index])
        keys = {name: sorted(self.state.moments[name]) for name in names}
        for name in names:
            if keys[name] != keys[names[0]]:
                raise CheckpointMismatch(
                    f'{self.state.where}: {names[0]} has optimizer state {keys[names[0]]} and '
                    f'{name} has {keys[name]}, and they are one group now'
                )
            odd = [key for key in keys[name] if self._whole_shape(name, key) is not None]
            if odd and self.wrapper.partitioned:
                raise CheckpointMismatch(
                    f'{self.state.where}: {odd[0]} of {name} has not a number for each element, '
                    'and cannot be partitioned: such state goes on only at ZeRO stage 0'
                )
        return keys[names[0]]

    def _steps_of_group(self, index: int) -> dict[str, float]:
        names = list(self.layout.groups[index])
        steps = self._steps_of(names[0], index)
        for name in names:
            other_steps = self._steps_of(name, index)
            if other_steps != steps:
                raise CheckpointMismatch(
                    f'{self.state.where}: the optimizer has counted {steps} for {names[0]} and '
                    f'{other_steps} for {name}, and they are one group now'
                )
        return steps

    def _steps_of(self, name: str, index: int) -> dict[str, float]:
        """The numbers of a parameter, of which some optimizers have one for all of a group."""
        steps, trial = dict(self.state.steps[name]), self.trials[index]
        if trial is None or not (steps or self.state.moments[name]):
            return steps
        settings = self.state.settings.get(name, {})
        numbers = {key for key, form in trial.forms.items() if form == NUMBER}
        steps.update({k: float(settings[k]) for k in numbers - steps.keys() if k in settings})
        return {key: steps[key] for key in steps if key in trial.forms or key in trial.late}

    def _counters(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The entries that the optimizer counts in its groups, and what the checkpoint has."""
        groups: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        for index, (group, trial) in enumerate(zip(self.groups, self.trials, strict=True)):
            counts = groups.setdefault(id(group), (group, {}))[1]
            for name in self.layout.groups[index]:
                settings = self.state.settings.get(name, {})
                for key in settings.keys() & (trial.counters.keys() if trial else ()):
                    value = like(settings[key], group.get(key, settings[key]))
                    if repr(counts.setdefault(key, value)) != repr(value):
                        raise CheckpointMismatch(
                            f'{self.state.where}: the groups of the optimizer have counted {key} '
                            f'{counts[key]} and {value}, and they are one group now'
                        )
        return list(groups.values())


def _with_frozen(state: NamedState, engine: DeepSpeedEngine, layout: Layout) -> NamedState:
    """A torch optimizer's groups may hold frozen parameters, which ZeRO leaves out of its own."""
    running = shapes_of(layout)
    frozen = {
        name: state.fixed[name]
        for name, parameter in engine.module.named_parameters()
        if not parameter.requires_grad and name in running and name in state.fixed
    }
    return replace(
        state,
        masters={**state.masters, **frozen},
        moments={**state.moments, **{name: {} for name in frozen}},
        steps={**state.steps, **{name: {} for name in frozen}},
        fixed={name: flat for name, flat in state.fixed.items() if name not in frozen},
    )


def _require_same_trained(state: NamedState, layout: Layout) -> None:
    running = shapes_of(layout)
    gaps = [name for name in running if name not in state.masters]
    # A torch optimizer's groups may hold frozen parameters too; it keeps no state for them.
    extras = [n for n in state.masters if n not in running and (state.moments[n] or state.steps[n])]
    if gaps or extras:
        parts = []
        if gaps:
            parts.append(f'{len(gaps)} parameters are trained now and were not: {few(gaps)}')
        if extras:
            parts.append(f'{len(extras)} were trained and are not now: {few(extras)}')
        raise CheckpointMismatch(f'{state.where}: {"; ".join(parts)}')


def _require_known_layout(layout: Layout, rank: int, masters: list[torch.Tensor]) -> None:
    """Refuses other partitionings than DeepSpeed's plain one, such as MiCS and expert parallel."""
    least = [layout.least_length(rank, group) for group in range(len(layout.groups))]
    if len(masters) != len(least) or any(
        master.numel() < length for master, length in zip(masters, least, strict=True)
    ):
        raise CheckpointError(
            f'the masters of this engine have {few([m.numel() for m in masters])} elements, where '
            f'ZeRO keeps {few(least)}: this partitioning is not known'
        )


def _untrained_tensors(
    engine: DeepSpeedEngine, weights: Mapping[str, Flat], layout: Layout
) -> Iterator[tuple[torch.Tensor, Flat, tuple[int, int] | None]]:
    """Frozen parameters and buffers: where to, what, and which elements of it (None for all)."""
    trained = shapes_of(layout).keys()
    names = {id(p): name for name, p in engine.module.named_parameters()}
    for name, target in engine.module.state_dict(keep_vars=True).items():
        if names.get(id(target)) in trained:
            continue
        flat, bounds = weights[name], own_slice(target) if is_sharded(target) else None
        flat.pieces(*(bounds or (0, flat.numel)))  # opens what `restore` will read
        yield (target if bounds is None else local_values(target).data), flat, bounds
