"""ZeRO shards of a tag, read as data: no code of the file runs, no process group is needed.

Layouts are those of DeepSpeed 0.19 (see deepspeed/utils/zero_to_fp32.py for its own reader):
stages 0-2 keep whole weights in ``mp_rank_00_model_states.pt``; at stage 3 every parameter is cut
into one slice per rank, zero-padded to equal length, and the slices of a rank's trainable
parameters follow each other in its flat fp32 groups.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from internvl_ds.errors import CheckpointError


def read_shard(path: Path | str, *, mmap: bool = False) -> Any:
    """Reads one file that torch.save wrote, allowing only tensors, plain types and the classes
    that DeepSpeed itself puts into its shards.

    Raises:
        CheckpointError: when the file cannot be read, or holds anything else (which is named).
    """
    try:
        with torch.serialization.safe_globals(_deepspeed_classes()):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'{path}: refused, because it holds more than tensors and plain data: {error}'
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f'{path}: cannot be read: {error}') from error


class TagShards:
    """The shards of one tag directory, of ours or of plain DeepSpeed."""

    def __init__(self, tag: Path) -> None:
        """Finds the files of the tag.

        Raises:
            CheckpointError: when it has no model states.
        """
        self.tag = tag
        model_files = [p for p in tag.glob('*_model_states.pt') if 'expert' not in p.name]
        self.model_files = sorted(model_files, key=_dp_rank)
        self.optim_files = sorted(tag.glob('*_optim_states.pt'), key=_dp_rank)
        if not self.model_files:
            raise CheckpointError(f'{tag}: no *_model_states.pt, so it is no DeepSpeed checkpoint')

    @cached_property
    def head(self) -> Mapping[str, Any]:
        """The first rank's model states: what all ranks have in common is in it."""
        head = read_shard(self.model_files[0], mmap=True)
        if not isinstance(head, Mapping) or 'module' not in head:
            raise CheckpointError(f'{self.model_files[0]}: not the model states of DeepSpeed')
        return head

    def read(self, path: Path) -> Any:
        """What one of the files holds, mapped into memory; the first rank's is read once.

        Raises:
            CheckpointError: as `read_shard`.
        """
        return self.head if path == self.model_files[0] else read_shard(path, mmap=True)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that the tag was saved at."""
        zero = (self.head.get('ds_config') or {}).get('zero_optimization') or {}
        return int(zero.get('stage', 0))

    @property
    def world_size(self) -> int:
        """The number of data-parallel ranks that saved it."""
        return int(self.head['dp_world_size'])

    @property
    def global_steps(self) -> int:
        """Updates counted by the engine that saved it."""
        return int(self.head['global_steps'])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter and buffer of the model that was saved."""
        if self.zero_stage < 3:
            return {name: tuple(t.shape) for name, t in self.head['module'].items()}
        shapes = {name: tuple(t.shape) for name, t in self._buffers().items()}
        for group in self.head['param_shapes']:
            shapes.update({name: tuple(shape) for name, shape in group.items()})
        frozen = self.head.get('frozen_param_shapes') or {}
        shapes.update({name: tuple(shape) for name, shape in frozen.items()})
        for alias, name in _pairs(self.head.get('shared_params')):
            shapes[alias] = shapes[name]
        return shapes

    def groups(self) -> list[list[str]]:
        """The names of each parameter group's tensors; '' where the tag does not say them."""
        if self.zero_stage:
            return [list(group) for group in self.head['param_shapes'] or []]
        optimizer = self.head['optimizer'] or {}
        groups = optimizer.get('optimizer_state_dict', optimizer).get('param_groups', [])
        return [group.get('param_names') or [''] * len(group['params']) for group in groups]

    def weights(self) -> dict[str, torch.Tensor]:
        """Name -> whole tensor (on the CPU) of every parameter and buffer, for evaluation.

        In the dtype of the model at stages 0-2; at stage 3 the fp32 masters, whose rounding is
        what the model computed with.
        """
        if self.zero_stage < 3:
            return dict(self.head['module'])
        weights = self.merge(
            [optim['fp32_flat_groups'] for optim in self._optim_states()], self.head
        )
        weights.update(self._frozen())
        weights.update(self._buffers())
        for alias, name in _pairs(self.head.get('shared_params')):
            weights[alias] = weights[name]
        return weights

    def merge(
        self, flat_groups: Sequence[Sequence[torch.Tensor]], head: Mapping[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """Puts flat partitions together into tensors by parameter name.

        Args:
            flat_groups: for each rank, its flat tensors, one a group, in the layout that the tag's
                ZeRO stage gives to fp32 masters (also that of their average).
            head: where ``param_shapes`` is; the tag's own by default.

        Raises:
            CheckpointError: when the sizes do not add up.
        """
        groups = (head or self.head)['param_shapes']
        if self.zero_stage == 3:
            return self._merge_slices(flat_groups, groups)
        return self._merge_runs(flat_groups, groups)

    def _merge_slices(
        self, flat_groups: Sequence[Sequence[torch.Tensor]], groups: Sequence[Mapping[str, Any]]
    ) -> dict[str, torch.Tensor]:
        flats = [torch.cat([t.detach().reshape(-1) for t in flat]) for flat in flat_groups]
        shapes = dict(itertools.chain.from_iterable(group.items() for group in groups))
        lengths = {n: math.ceil(math.prod(shape) / len(flats)) for n, shape in shapes.items()}
        needed, found = sum(lengths.values()), [flat.numel() for flat in flats]
        if any(numel != needed for numel in found):
            raise CheckpointError(
                f'{self.tag}: the parameters need {needed} elements of each rank, and the shards '
                f'have {found}'
            )
        merged, offset = {}, 0
        for name, shape in shapes.items():
            numel, length = math.prod(shape), lengths[name]
            slices = [flat[offset : offset + length] for flat in flats]
            merged[name] = torch.cat(slices)[:numel].reshape(tuple(shape))
            offset += length
        return merged

    def _merge_runs(
        self, flat_groups: Sequence[Sequence[torch.Tensor]], groups: Sequence[Mapping[str, Any]]
    ) -> dict[str, torch.Tensor]:
        paddings = self._optim_states()[0].get('param_alignment_paddings')
        merged = {}
        for index, shapes in enumerate(groups):
            flat = torch.cat(
                [rank_groups[index].detach().reshape(-1) for rank_groups in flat_groups]
            )
            gaps = paddings[index] if paddings else [0] * len(shapes)
            offset = 0
            for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
                numel = math.prod(shape)
                if offset + numel > flat.numel():
                    raise CheckpointError(
                        f'{self.tag}: {name} ends at element {offset + numel} of group {index}, '
                        f'and the shards have {flat.numel()}'
                    )
                merged[name] = flat[offset : offset + numel].reshape(tuple(shape))
                offset += numel + gap
        return merged

    def _optim_states(self) -> list[Mapping[str, Any]]:
        if len(self.optim_files) != self.world_size:
            raise CheckpointError(
                f'{self.tag}: saved by {self.world_size} ranks, but it has '
                f'{len(self.optim_files)} *_optim_states.pt files'
            )
        return [read_shard(p, mmap=True)['optimizer_state_dict'] for p in self.optim_files]

    def _buffers(self) -> dict[str, torch.Tensor]:
        names = set(self.head.get('buffer_names') or ())
        return {name: t for name, t in self.head['module'].items() if name in names}

    def _frozen(self) -> dict[str, torch.Tensor]:
        shapes = self.head.get('frozen_param_shapes') or {}
        if not shapes:
            return {}
        parts = [read_shard(p, mmap=True)['frozen_param_fragments'] for p in self.model_files]
        whole = {name: torch.cat([part[name].reshape(-1) for part in parts]) for name in shapes}
        return {
            name: whole[name][: math.prod(shape)].reshape(tuple(shape))
            for name, shape in shapes.items()
        }


def _dp_rank(path: Path) -> int:
    # [bf16_]zero_pp_rank_{dp}_mp_rank_{mp}_...: the first number is the data-parallel rank.
    digits = path.name.partition('pp_rank_')[2].partition('_')[0]
    return int(digits) if digits.isdigit() else 0


def _pairs(shared: Any) -> list[tuple[str, str]]:
    return list(shared.items()) if isinstance(shared, Mapping) else [tuple(p) for p in shared or ()]


def _deepspeed_classes() -> list[Any]:
    """The classes that DeepSpeed 0.19 pickles into its own shards."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
