"""Puts state by parameter name into the partitioning that runs, whatever layout it was saved in."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from internvl_ds.checkpoint.named import Flat, NamedState, fill
from internvl_ds.checkpoint.partition import Layout, owned, shapes_of
from internvl_ds.checkpoint.restore import (
    model_shapes,
    own_slice,
    release_gathered,
    require_same_model,
)
from internvl_ds.errors import CheckpointError, CheckpointMismatch, few
from internvl_ds.masters import kept_on_nvme, master_weights, partitioning, push_masters

# State of DeepSpeed's own Adams, which cannot be tried on a copy: that would end the original's.
_ADAM_STATE: dict[str, Any] = {'exp_avg': torch.empty(1), 'exp_avg_sq': torch.empty(1), 'step': 0}


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
        _require_in_memory(engine)
        weights = saved.weights()
        shapes = {name: tuple(flat.shape) for name, flat in weights.items()}
        require_same_model(shapes, model_shapes(engine.module), saved.where)
        self.layout, self.rank = partitioning(engine)
        saved = _with_frozen(saved, engine, self.layout)
        self.engine, self.saved = engine, saved
        self.masters = list(master_weights(engine).values())
        _require_same_trained(saved, self.layout)
        _require_known_layout(self.layout, self.rank, self.masters)
        self.fragments = owned(self.layout, self.rank)
        self.expected = _state_of_a_step(engine)
        self.keys = [self._keys_of_group(index) for index in range(len(self.masters))]
        self.steps = [self._steps_of_group(index) for index in range(len(self.masters))]
        self.fixed = _fixed(engine, weights, self.layout)
        for fragments in self.fragments:
            for name, place in fragments:
                for flat in (saved.masters[name], *(saved.moments[name].values())):
                    flat.pieces(place.start, place.stop)  # opens what `restore` will read

    @torch.no_grad()
    def restore(self) -> None:
        """Sets weights, optimizer state and counters. Every rank must call it: a collective."""
        optimizer: Any = self.engine.optimizer
        if self.engine.zero_optimization_partition_weights():
            release_gathered(optimizer)
        for target, flat, slice_of in self.fixed:
            if slice_of is None:
                target.data.copy_(flat.whole())
            else:
                flat.copy_to(target[: slice_of[1] - slice_of[0]], slice_of[0])
        state = self.engine.basic_optimizer.state
        for index, master in enumerate(self.masters):
            fill(master.data, self.fragments[index], self.saved.masters)
            self._restore_group_state(index, master, state)
        push_masters(self.engine)
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
            own = before.get(key)
            if not isinstance(own, torch.Tensor) or own.shape != master.shape:
                before[key] = torch.zeros_like(master.data)
            moments = {n: self.saved.moments[n][key] for n in self.layout.groups[index]}
            fill(before[key], self.fragments[index], moments)
        for key, number in steps.items():
            before[key] = self._number_like(key, number)

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
        found = set(keys[names[0]]) | self.saved.steps[names[0]].keys()
        if self.expected is not None and found and found != self.expected.keys():
            optimizer = type(self.engine.basic_optimizer).__name__
            raise CheckpointMismatch(
                f'{self.saved.where}: holds {sorted(found)} of an optimizer, and {optimizer} keeps '
                f'{sorted(self.expected)}: it was saved with another optimizer'
            )
        return keys[names[0]]

    def _steps_of_group(self, index: int) -> dict[str, float]:
        names = list(self.layout.groups[index])
        steps = dict(self.saved.steps[names[0]])
        for name in names:
            if self.saved.steps[name] != steps:
                raise CheckpointMismatch(
                    f'{self.saved.where}: the optimizer has counted {steps} for {names[0]} and '
                    f'{dict(self.saved.steps[name])} for {name}, and they are one group now'
                )
        return steps

    def _number_like(self, key: str, number: float) -> Any:
        """A number as this optimizer keeps it: a tensor, an int or a float."""
        like = (self.expected or {}).get(key)
        if isinstance(like, torch.Tensor) or like is None:
            dtype = torch.float32 if like is None else like.dtype
            device = None if like is None else like.device
            return torch.tensor(number, dtype=dtype, device=device)
        return type(like)(number)


def _require_in_memory(engine: DeepSpeedEngine) -> None:
    if engine.optimizer is None or engine.basic_optimizer is None:
        raise CheckpointError('this engine has no optimizer: load with EVAL_MODE')
    for what in kept_on_nvme(engine):
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
        if hasattr(target, 'ds_tensor'):
            bounds = own_slice(target)
            flat.pieces(*bounds)
            found.append((target.ds_tensor.data, flat, bounds))
        else:
            flat.pieces(0, flat.numel)
            found.append((target, flat, None))
    return found


def _state_of_a_step(engine: DeepSpeedEngine) -> dict[str, Any] | None:
    """The state that one step makes this optimizer keep; None where that cannot be told."""
    optimizer = engine.basic_optimizer
    if type(optimizer).__module__.startswith('deepspeed.'):
        return _ADAM_STATE if 'Adam' in type(optimizer).__name__ else None
    trial: Any = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    hooks = ('_optimizer_step_pre_hooks', '_optimizer_step_post_hooks')
    trial.__dict__.update({name: OrderedDict() for name in hooks})
    device = next(iter(master_weights(engine).values())).device
    parameter = nn.Parameter(torch.zeros(2, device=device))
    parameter.grad = torch.zeros(2, device=device)
    trial.state = defaultdict(dict)
    trial.param_groups = [{**optimizer.param_groups[0], 'params': [parameter]}]
    try:
        type(optimizer).step(trial)
    except Exception:  # it needs a closure, or more than its class says
        return None
    return {k: v for k, v in trial.state[parameter].items() if v is not None}
