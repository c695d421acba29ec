"""Weights and optimizer state in the ZeRO shards of a tag; no process group is needed.

Stages 0-2 keep whole weights in ``mp_rank_00_model_states.pt``; at stage 3 every parameter is cut
into one slice per rank, zero-padded to equal length, and the slices of a rank's trainable
parameters follow each other in its flat fp32 groups.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from internvl_ds.checkpoint.formats.optimizer_state import (
    KeptTensor,
    State,
    kept_tensors,
    split,
    state_by_order,
)
from internvl_ds.checkpoint.formats.shard_files import ShardFiles
from internvl_ds.config.ds.resolve import precision_of
from internvl_ds.errors import CheckpointError
from internvl_ds.zero.lazy_tensor import Flat, NamedState
from internvl_ds.zero.partition import Layout, Runs, Slices, describe, shapes_of

_MASTERS = 'single_partition_of_fp32_groups'
_COUNTERS = ('global_steps', 'skipped_steps', 'global_samples')


class TagShards(ShardFiles):
    """The content of one tag's shards, by parameter name."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter and buffer of the model that was saved."""
        if self.zero_stage < 3:
            return {name: tuple(t.shape) for name, t in self.head['module'].items()}
        shapes = {name: tuple(t.shape) for name, t in self._buffers().items()}
        for group in self.head['param_shapes']:
            shapes.update({name: tuple(shape) for name, shape in group.items()})
        frozen = self.head.get('frozen_param_shapes') or {}
        shapes.update({name: tuple(shape) for name, shape in frozen.items()})
        for alias, name in self.aliases().items():
            shapes[alias] = shapes[name]
        return shapes

    def groups(self) -> list[list[str]]:
        """The names of each parameter group's tensors; '' where the tag does not say them."""
        if self.zero_stage:
            return [list(group) for group in self.head['param_shapes'] or []]
        groups = self.plain_optimizer().get('param_groups', [])
        return [group.get('param_names') or [''] * len(group['params']) for group in groups]

    @cached_property
    def layout(self) -> Layout:
        """How the masters are partitioned, stages 1 to 3; CheckpointError without a rank's file."""
        groups = self.head['param_shapes'] or []
        if self.zero_stage == 3:
            return Slices(groups, self.world_size)
        first = self._optim(0)
        masters, paddings = first[_MASTERS], first.get('group_paddings') or [0] * len(groups)
        sizes = [part.numel() + pad for part, pad in zip(masters, paddings, strict=True)]
        return Runs(groups, first.get('param_alignment_paddings'), sizes, self.world_size)

    def flats(self, source: Callable[[int, int], torch.Tensor]) -> dict[str, Flat]:
        """Parameter -> its elements in flat tensors that are partitioned as the masters are.

        ``source``: (rank, group) -> the flat tensor.
        """
        return {
            name: Flat(f'{self.tag}: {name}', shape, list(self.layout.places(name)), source)
            for name, shape in shapes_of(self.layout).items()
        }

    def weights(self) -> dict[str, torch.Tensor]:
        """Name -> whole tensor (on the CPU) of every parameter and buffer, for evaluation.

        In the dtype of the model at stages 0-2; at stage 3 the fp32 masters, whose rounding is
        what the model computed with.
        """
        if self.zero_stage < 3:
            return dict(self.head['module'])
        return {name: flat.whole() for name, flat in self.named_weights().items()}

    def named_weights(self) -> dict[str, Flat]:
        """As `weights`, not read yet."""
        if self.zero_stage < 3:
            return {n: Flat.of(f'{self.tag}: {n}', t) for n, t in self.head['module'].items()}
        weights = {**self.flats(self._master), **self._frozen()}
        weights.update({n: Flat.of(f'{self.tag}: {n}', t) for n, t in self._buffers().items()})
        weights.update({alias: weights[name] for alias, name in self.aliases().items()})
        return weights

    def in_order(self, weights: Mapping[str, Flat]) -> dict[str, Flat]:
        """Weights by name in the order of the model's state dict."""
        return {name: weights[name] for name in self.head['module'] if name in weights}

    def named_state(self, names: Sequence[Sequence[str]] | None = None) -> NamedState:
        """The training state by parameter name; reads only the pickles, no tensor yet.

        ``names``: of each group's parameters, where a tag of stage 0 does not say them itself.
        CheckpointError when a file is missing, or the tag holds no optimizer.
        """
        state = self._partitioned_state() if self.zero_stage else self._whole_state(names)
        if self.zero_stage == 3:
            fixed = {name: Flat.of(name, t) for name, t in self._buffers().items()}
            fixed.update(self._frozen())
        else:
            rest = self.head['module'].keys() - state.masters.keys() - self.aliases().keys()
            fixed = {name: Flat.of(name, self.head['module'][name]) for name in rest}
        return NamedState(
            where=str(self.tag),
            layout=describe(self.zero_stage, self.world_size, precision_of(self.ds_config)),
            **state._asdict(),
            fixed=fixed,
            aliases=self.aliases(),
            counters={k: int(self.head[k]) for k in _COUNTERS if self.head.get(k) is not None},
            fresh=self.fresh,
        )

    def settings(self) -> list[dict[str, Any]]:
        """The settings of each parameter group, as the optimizer kept them, and its names."""
        optimizer = self._optimizer_of(0) if self.zero_stage else self.plain_optimizer()
        groups = optimizer.get('param_groups', [])
        names = self.groups()
        if self.zero_stage == 3:  # a group may be several sub-groups
            parts = iter(names)
            names = [[n for _ in group['params'] for n in next(parts)] for group in groups]
        return [
            {**{k: v for k, v in group.items() if k != 'params'}, 'param_names': group_names}
            for group, group_names in zip(groups, names, strict=True)
        ]

    def optimizer_state(self, rank: int) -> list[KeptTensor]:
        """What one rank's optimizer keeps, for each of its tensors in its order.

        CheckpointError when the tag holds no optimizer.
        """
        states: Any = self.plain_optimizer()
        if self.zero_stage:
            optim = self._optim(rank)
            states = optim.get('base_optimizer_state')
            states = optim.get('optimizer_state_dict') if self.zero_stage == 3 else states
        if isinstance(states, list):  # the elastic_checkpoint form: a state for each group
            step = {'step': optim.get('base_optimizer_state_step')}
            return [KeptTensor(state, step) for state in states]
        if not states:
            raise CheckpointError(f'{self.tag}: holds no state of an optimizer')
        return kept_tensors(states)

    def aliases(self) -> dict[str, str]:
        """Further name of a tied parameter -> the name that it is saved under."""
        if self.zero_stage or self.head.get('shared_params'):
            return dict(self.head.get('shared_params') or ())  # a mapping, or pairs
        # Stage 0 does not say; tensors that shared their memory still do.
        first: dict[tuple[int, Any], str] = {}
        aliases = {}
        for name, tensor in self.head['module'].items():
            key = (tensor.data_ptr(), tensor.shape)
            if tensor.numel() and first.setdefault(key, name) != name:
                aliases[name] = first[key]
        return aliases

    def _partitioned_state(self) -> State:
        shapes = shapes_of(self.layout)
        moments: dict[str, dict[str, Flat]] = {name: {} for name in shapes}
        steps: dict[str, dict[str, float]] = {}
        settings: dict[str, Mapping[str, Any]] = {}
        tensors_of_rank, unnamed = self.optimizer_state(0), ''
        for index, group in enumerate(self.layout.groups):
            state = self._group_state(0, index)
            tensors, numbers, other = split(str(self.tag), f'group {index}', state)
            unnamed = unnamed or other
            for key, tensor in tensors.items():
                if tensor.numel not in self._lengths(index):
                    unnamed = f'{key} of group {index} has not a number for each element'
                    continue
                source = functools.partial(self._moment, key)
                for name in group:
                    places = list(self.layout.places(name))
                    of = f'{self.tag}: {key} of {name}'
                    moments[name][key] = Flat(of, shapes[name], places, source)
            steps.update(dict.fromkeys(group, numbers))
            settings.update(dict.fromkeys(group, tensors_of_rank[index].settings))
        return State(self.flats(self._master), moments, steps, settings, unnamed)

    def _lengths(self, group: int) -> list[int]:
        """Lengths of the first rank's part of a group, with and without padding."""
        optim = self._optim(0)
        if self.zero_stage == 3:
            return [optim['fp32_flat_groups'][group].numel()]
        paddings = optim.get('group_paddings')
        lean = optim[_MASTERS][group].numel()
        return [lean, lean + (paddings[group] if paddings else 0)]

    def _whole_state(self, names: Sequence[Sequence[str]] | None) -> State:
        optimizer = self.plain_optimizer()
        if not optimizer:
            raise CheckpointError(f'{self.tag}: holds no state of an optimizer')
        groups = self.groups()
        if names is not None and not all(itertools.chain.from_iterable(groups)):
            groups = [list(group) for group in names]
        lows = self.head['optimizer'].get('fp32_groups')
        return state_by_order(
            str(self.tag), optimizer, groups, self.head['module'],
            None if lows is None else list(itertools.chain.from_iterable(lows)),
        )  # fmt: skip

    def plain_optimizer(self) -> Mapping[str, Any]:
        """Stage 0: the torch optimizer's state dict; empty where there was none."""
        optimizer = self.head.get('optimizer') or {}
        return optimizer.get('optimizer_state_dict', optimizer)

    def _optim(self, rank: int) -> Mapping[str, Any]:
        """One rank's optimizer shard, opened once."""
        if len(self.optim_files) != self.world_size:
            raise CheckpointError(
                f'{self.tag}: saved by {self.world_size} ranks, but it has '
                f'{len(self.optim_files)} *_optim_states.pt files'
            )
        state = self.read(self.optim_files[rank]).get('optimizer_state_dict')
        if not isinstance(state, Mapping):
            raise CheckpointError(f'{self.optim_files[rank]}: holds no state of an optimizer')
        return state

    def _optimizer_of(self, rank: int) -> Mapping[str, Any]:
        """The state dict of the optimizer inside DeepSpeed's, in one rank's shard."""
        optim = self._optim(rank)
        state = optim.get(
            'optimizer_state_dict' if self.zero_stage == 3 else 'base_optimizer_state'
        )
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f'{self.optim_files[rank]}: its optimizer state is in the elastic_checkpoint form '
                'of old DeepSpeed versions, which is not read'
            )
        return state

    def _group_state(self, rank: int, group: int) -> Mapping[str, Any]:
        optimizer = self._optimizer_of(rank)
        keys = [key for g in optimizer['param_groups'] for key in g['params']]
        state = dict(optimizer['state'].get(keys[group], {}))
        if state and 'step' not in state:  # apex's way, of some fused optimizers
            numbers = [g.get('step') for g in optimizer['param_groups'] for _ in g['params']]
            state['step'] = numbers[group]
        return state

    def _moment(self, key: str, rank: int, group: int) -> torch.Tensor:
        state = self._group_state(rank, group)
        if key not in state:
            raise CheckpointError(f'{self.optim_files[rank]}: group {group} has no {key}')
        return state[key].reshape(-1)

    def _master(self, rank: int, group: int) -> torch.Tensor:
        key = 'fp32_flat_groups' if self.zero_stage == 3 else _MASTERS
        return self._optim(rank)[key][group].detach().reshape(-1)

    def _buffers(self) -> dict[str, torch.Tensor]:
        names = set(self.head.get('buffer_names') or ())
        return {name: t for name, t in self.head['module'].items() if name in names}

    def _frozen(self) -> dict[str, Flat]:
        """Stage 3: frozen parameters, one slice in each rank's file."""
        shapes = self.head.get('frozen_param_shapes') or {}
        layout = Slices([{name: shape} for name, shape in shapes.items()], self.world_size)
        names = list(shapes)

        def fragment(rank: int, group: int) -> torch.Tensor:
            content = self.read(self.model_files[rank])
            return content['frozen_param_fragments'][names[group]].reshape(-1)

        return {
            name: Flat(f'{self.tag}: {name}', shape, list(layout.places(name)), fragment)
            for name, shape in shapes.items()
        }


def masters_in(state: Mapping[str, Any]) -> Sequence[torch.Tensor]:
    """The flat masters in one rank's optimizer state, group by group, of stages 1 to 3."""
    masters: Sequence[torch.Tensor] = state.get(_MASTERS) or state.get('fp32_flat_groups') or ()
    return masters
