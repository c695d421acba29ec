"""Puts state by parameter name into the partitioning that runs, whatever layout it was saved in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.checkpoint.optimizer_state import RunningOptimizer, SavedTensor
from internvl_ds.checkpoint.restore import model_shapes, require_same_model
from internvl_ds.engine.optimizer_trial import NUMBER, forms_of, like, state_of_optimizer
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.errors import CheckpointError, CheckpointMismatch, few
from internvl_ds.zero.lazy_tensor import Flat, NamedState, fill
from internvl_ds.zero.parameters import is_sharded, local_values, own_slice
from internvl_ds.zero.partition import Layout, owned, shapes_of
from internvl_ds.zero.wrapper import Wrapper


class Restorer:
    """What a saved state and a running engine have to do with each other.

    Making one reads and checks; only `restore` changes anything. Every rank makes its own.
    """

    def __init__(self, engine: DeepSpeedEngine, saved: NamedState) -> None:
        """Checks that all of the running state is in the checkpoint, and can be read.

        Raises:
            CheckpointMismatch: for another model, other trained parameters, another optimizer or
                parameter groups that cannot share a step; names the first that differ.
            CheckpointError: when a shard cannot be read, or the engine keeps its state on NVMe.
        """
        self.engine, self.wrapper = engine, wrapper_of(engine)
        require_in_memory(self.wrapper)
        saved.require_all_named()
        optimizer = RunningOptimizer(self.wrapper.client)
        weights = saved.weights()
        shapes = {name: tuple(flat.shape) for name, flat in weights.items()}
        require_same_model(shapes, model_shapes(engine.module), saved.where)
        self.layout, self.rank = self.wrapper.partitioning()
        saved = _with_frozen(saved, engine, self.layout)
        self.saved = saved
        self.masters = list(self.wrapper.masters().values())
        _require_same_trained(saved, self.layout)
        _require_known_layout(self.layout, self.rank, self.masters)
        self.fragments = owned(self.layout, self.rank)
        self.groups = self._groups_of_masters()
        self.warnings = self._require_same_optimizer(optimizer)
        self.kept = [
            optimizer.kept(group, master)
            for group, master in zip(self.groups, self.masters, strict=True)
        ]
        self.keys = [self._keys_of_group(index) for index in range(len(self.masters))]
        self.steps = [self._steps_of_group(index) for index in range(len(self.masters))]
        self.counters = self._counters()
        self.fixed = _fixed(engine, weights, self.layout)
        for fragments in self.fragments:
            for name, place in fragments:
                # Opens what `restore` will read.
                saved.masters[name].pieces(place.start, place.stop)
                for key, flat in saved.moments[name].items():
                    whole = self._whole_shape(name, key) is not None
                    flat.pieces(*((0, flat.numel) if whole else (place.start, place.stop)))

    @torch.no_grad()
    def restore(self) -> None:
        """Sets weights, optimizer state and counters. Collective: every rank calls it."""
        self.wrapper.release_gathered()
        for target, flat, slice_of in self.fixed:
            if slice_of is None:
                target.data.copy_(flat.whole())
            else:
                flat.copy_to(target[: slice_of[1] - slice_of[0]], slice_of[0])
        state = state_of_optimizer(self.wrapper.client)
        for index, master in enumerate(self.masters):
            fill(master.data, self.fragments[index], self.saved.masters)
            self._restore_group_state(index, master, state)
        for group, counted in self.counters:
            group.update(counted)
        self.wrapper.push_masters()
        counters = self.saved.counters
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
            moments = {n: self.saved.moments[n][key] for n in self.layout.groups[index]}
            shape = self._whole_shape(next(iter(moments)), key) or master.shape
            own = before.get(key)
            if not isinstance(own, torch.Tensor) or own.shape != shape:
                before[key] = torch.zeros(shape, dtype=master.dtype, device=master.device)
            if shape == master.shape:
                fill(before[key], self.fragments[index], moments)
            else:
                before[key].copy_(next(iter(moments.values())).whole())
        kept = self.kept[index]
        for key, number in steps.items():
            before[key] = like(number, kept.numbers.get(key) if kept else None)

    def _groups_of_masters(self) -> list[dict[str, Any]]:
        """For each master, the group of the optimizer that it is in."""
        slots = self.wrapper.slots()
        if self.wrapper.partitioned:
            return [group for group, _ in slots]
        groups = {id(tensor): group for group, tensor in slots}
        return [groups[id(master)] for master in self.masters]

    def _require_same_optimizer(self, optimizer: RunningOptimizer) -> list[str]:
        saved, found = self.saved, []
        for index, (group, master) in enumerate(zip(self.groups, self.masters, strict=True)):
            for name, shape in self.layout.groups[index].items():
                forms = forms_of({**saved.steps[name], **saved.moments[name]}, shape)
                settings = saved.settings.get(name, {})
                found.append((SavedTensor([name], forms, settings), group, master))
        return optimizer.require_saved_by(saved.where, saved.optimizer, saved.fresh, found)

    def _whole_shape(self, name: str, key: str) -> torch.Size | None:
        """The shape of state that has not a number for each element of its parameter."""
        own = self.saved.moments[name][key].shape
        return None if own == self.saved.masters[name].shape else own

    def _keys_of_group(self, index: int) -> list[str]:
        """The tensors that the optimizer keeps for a group, which is one to it."""
        names = list(self.layout.groups[index])
        keys = {name: sorted(self.saved.moments[name]) for name in names}
        for name in names:
            if keys[name] != keys[names[0]]:
                raise CheckpointMismatch(
                    f'{self.saved.where}: {names[0]} has optimizer state {keys[names[0]]} and '
                    f'{name} has {keys[name]}, and they are one group now'
                )
            odd = [key for key in keys[name] if self._whole_shape(name, key) is not None]
            if odd and self.wrapper.partitioned:
                raise CheckpointMismatch(
                    f'{self.saved.where}: {odd[0]} of {name} has not a number for each element, '
                    'and cannot be partitioned: such state goes on only at ZeRO stage 0'
                )
        return keys[names[0]]

    def _steps_of_group(self, index: int) -> dict[str, float]:
        names = list(self.layout.groups[index])
        steps = self._steps_of(names[0], index)
        for name in names:
            own = self._steps_of(name, index)
            if own != steps:
                raise CheckpointMismatch(
                    f'{self.saved.where}: the optimizer has counted {steps} for {names[0]} and '
                    f'{own} for {name}, and they are one group now'
                )
        return steps

    def _steps_of(self, name: str, index: int) -> dict[str, float]:
        """The numbers of a parameter, of which some optimizers have one for all of a group."""
        steps, kept = dict(self.saved.steps[name]), self.kept[index]
        if kept is None or not (steps or self.saved.moments[name]):
            return steps
        settings = self.saved.settings.get(name, {})
        numbers = {key for key, form in kept.forms.items() if form == NUMBER}
        steps.update({k: float(settings[k]) for k in numbers - steps.keys() if k in settings})
        return {key: steps[key] for key in steps if key in kept.forms or key in kept.late}

    def _counters(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The entries that the optimizer counts in its groups, and what the checkpoint has."""
        found: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        for index, (group, kept) in enumerate(zip(self.groups, self.kept, strict=True)):
            counted = found.setdefault(id(group), (group, {}))[1]
            for name in self.layout.groups[index]:
                settings = self.saved.settings.get(name, {})
                for key in settings.keys() & (kept.counters.keys() if kept else ()):
                    value = like(settings[key], group.get(key, settings[key]))
                    if repr(counted.setdefault(key, value)) != repr(value):
                        raise CheckpointMismatch(
                            f'{self.saved.where}: the groups of the optimizer have counted {key} '
                            f'{counted[key]} and {value}, and they are one group now'
                        )
        return list(found.values())


def require_in_memory(wrapper: Wrapper) -> None:
    """Refuses an engine that keeps parameters or optimizer state on NVMe.

    Raises:
        CheckpointError: names the setting.
    """
    for what in wrapper.kept_on_nvme():
        raise CheckpointError(
            f'/zero_optimization/{what}/device is nvme: a checkpoint of another layout cannot '
            "be loaded into state that is on disk. Load it with device 'cpu' and save a tag; "
            'that tag loads with nvme in the same layout.'
        )


def _with_frozen(saved: NamedState, engine: DeepSpeedEngine, layout: Layout) -> NamedState:
    """A torch optimizer's groups may hold frozen parameters, which ZeRO leaves out of its own."""
    running = shapes_of(layout)
    frozen = {
        name: saved.fixed[name]
        for name, parameter in engine.module.named_parameters()
        if not parameter.requires_grad and name in running and name in saved.fixed
    }
    return replace(
        saved,
        masters={**saved.masters, **frozen},
        moments={**saved.moments, **{name: {} for name in frozen}},
        steps={**saved.steps, **{name: {} for name in frozen}},
        fixed={name: flat for name, flat in saved.fixed.items() if name not in frozen},
    )


def _require_same_trained(saved: NamedState, layout: Layout) -> None:
    running = shapes_of(layout)
    missing = [name for name in running if name not in saved.masters]
    # A torch optimizer's groups may hold frozen parameters too; it keeps no state for them.
    extra = [n for n in saved.masters if n not in running and (saved.moments[n] or saved.steps[n])]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f'{len(missing)} parameters are trained now and were not: {few(missing)}')
        if extra:
            parts.append(f'{len(extra)} were trained and are not now: {few(extra)}')
        raise CheckpointMismatch(f'{saved.where}: {"; ".join(parts)}')


def _require_known_layout(layout: Layout, rank: int, masters: list[torch.Tensor]) -> None:
    """Another cut than DeepSpeed's plain one (MiCS, expert parallel) would be filled wrongly."""
    least = [layout.least_length(rank, group) for group in range(len(layout.groups))]
    if len(masters) != len(least) or any(
        master.numel() < length for master, length in zip(masters, least, strict=True)
    ):
        raise CheckpointError(
            f'the masters of this engine have {few([m.numel() for m in masters])} elements, where '
            f'ZeRO keeps {few(least)}: this partitioning is not known'
        )


def _fixed(
    engine: DeepSpeedEngine, weights: Mapping[str, Flat], layout: Layout
) -> list[tuple[torch.Tensor, Flat, tuple[int, int] | None]]:
    """Frozen parameters and buffers: where to, what, and which elements of it (None for all)."""
    trained = shapes_of(layout).keys()
    names = {id(p): name for name, p in engine.module.named_parameters()}
    found: list[tuple[torch.Tensor, Flat, tuple[int, int] | None]] = []
    for name, target in engine.module.state_dict(keep_vars=True).items():
        if names.get(id(target)) in trained:
            continue
        flat = weights[name]
        if is_sharded(target):
            bounds = own_slice(target)
            flat.pieces(*bounds)
            found.append((local_values(target).data, flat, bounds))
        else:
            flat.pieces(0, flat.numel)
            found.append((target, flat, None))
    return found
