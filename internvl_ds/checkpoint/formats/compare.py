"""Two checkpoints of any kind, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from internvl_ds.checkpoint.formats.client_state import saved_state
from internvl_ds.checkpoint.formats.ema_files import EmaFiles, ema_flats
from internvl_ds.checkpoint.formats.export import weights_of_tag
from internvl_ds.checkpoint.formats.optimizer_state import state_by_order
from internvl_ds.checkpoint.formats.pth_format import open_file, weights_of_file
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.errors import CheckpointError, CheckpointMismatch
from internvl_ds.files.reading import interpreting
from internvl_ds.zero.lazy_tensor import Flat

_NUMBERS = ('epoch', 'max_accuracy', 'max_accuracy_ema', 'ema_decay')
_PIECE = 1 << 24  # elements compared at a time
_T = TypeVar('_T')


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        tensors: 'model/NAME', 'optimizer/NAME/KEY', 'ema/NAME' -> tensor.
        numbers: 'epoch', 'optimizer/NAME/step', ... -> value.
    """

    tensors: dict[str, Flat]
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One entry that is not the same in both.

    Attributes:
        name: of the entry.
        what: a sentence.
        largest: the largest absolute difference of an element, where both are tensors of a shape.
    """

    name: str
    what: str
    largest: float | None = None


def contents_of(path: Path) -> Contents:
    """Opens a tag, an original's .pth, a .safetensors or its index. No tensor is read yet."""
    if path.is_dir():
        with interpreting(path, CheckpointError):
            return _contents_of_tag(path)
    source = open_file(str(path))
    with interpreting(path, CheckpointError):
        return _contents_of_file(source, str(path))


def weights_of(path: Path) -> dict[str, Flat]:
    """The weights alone of what `contents_of` opens, by name. No tensor is read yet."""
    if path.is_dir():
        with interpreting(path, CheckpointError):
            return weights_of_tag(TagShards(path))
    source = open_file(str(path))
    with interpreting(path, CheckpointError):
        return _flats(str(path), _strip(weights_of_file(source, str(path))))


def differences(a: Contents, b: Contents) -> Iterator[Difference]:
    """Entries that only one has, or whose shapes or values differ; in order of name."""
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        if name not in a.tensors or name not in b.tensors:
            yield Difference(name, f'only in {"B" if name not in a.tensors else "A"}')
            continue
        one, other = a.tensors[name], b.tensors[name]
        if one.shape != other.shape and not name.startswith('optimizer/'):
            yield Difference(name, f'shape {tuple(one.shape)} and {tuple(other.shape)}')
        elif one.numel != other.numel:
            yield Difference(name, f'{one.numel} and {other.numel} elements')
        elif (difference := _compare(one, other)) is not None:
            yield Difference(name, *difference)
    for name in sorted(a.numbers.keys() | b.numbers.keys()):
        left, right = a.numbers.get(name), b.numbers.get(name)
        if left != right:
            yield Difference(name, f'{left} and {right}')


def _compare(one: Flat, other: Flat) -> tuple[str, float] | None:
    count, largest = 0, 0.0
    for start in range(0, one.numel, _PIECE):
        size = min(_PIECE, one.numel - start)
        left, right = torch.empty(size, dtype=one.dtype), torch.empty(size, dtype=other.dtype)
        one.copy_to(left, start)
        other.copy_to(right, start)
        unequal = (left != right) & ~((left != left) & (right != right))  # nan is nan
        count += int(unequal.sum())
        if unequal.any():
            gap = (left.double() - right.double()).abs()[unequal].nan_to_num(nan=float('inf'))
            largest = max(largest, float(gap.max()))
    if count:
        return f'{count} of {one.numel} elements differ, by up to {largest:.3g}', largest
    if one.dtype != other.dtype:
        return f'equal values, as {one.dtype} and {other.dtype}', 0.0
    return None


def _contents_of_tag(tag: Path) -> Contents:
    shards = TagShards(tag)
    state = saved_state(shards)
    tensors = _prefix('model', weights_of_tag(shards))
    numbers = _known_numbers(state)
    if shards.optim_files or shards.head.get('optimizer'):
        named_state = shards.named_state(state.get('optimizer_groups'))
        named_state.require_all_named()
        tensors |= _of_optimizer(named_state.moments)
        numbers |= _of_optimizer(named_state.steps)
    average = EmaFiles(tag)
    if average:
        tensors |= _prefix('ema', ema_flats(average))
    return Contents(tensors, numbers)


def _contents_of_file(source: Mapping[str, Any], where: str) -> Contents:
    weights = _strip(weights_of_file(source, where))
    tensors = _prefix('model', _flats(where, weights))
    numbers = _known_numbers(source)
    optimizer = source.get('optimizer')
    if isinstance(optimizer, Mapping) and 'param_groups' in optimizer:
        groups = _group_names(optimizer, weights)
        state = state_by_order(where, optimizer, groups, weights)
        if state.unnamed:
            raise CheckpointMismatch(f'{where}: {state.unnamed}, and cannot be compared')
        tensors |= _of_optimizer(state.moments)
        numbers |= _of_optimizer(state.steps)
    if isinstance(source.get('model_ema'), Mapping):
        tensors |= _prefix('ema', _flats(where, _strip(source['model_ema'])))
    return Contents(tensors, numbers)


def _known_numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that are present; an accuracy of 0 means none, as in a load."""
    numbers = {k: v for k in _NUMBERS if isinstance(v := state.get(k), int | float)}
    return {k: v for k, v in numbers.items() if v or not k.startswith('max_accuracy')}


def _group_names(optimizer: Mapping[str, Any], weights: Mapping[str, Any]) -> list[list[str]]:
    """The names of an optimizer's parameters: the saved ones, or else found by shape.

    The original numbers its parameters in the order of the model. Frozen parameters and buffers
    are in between: the next tensor of the right shape is taken.
    """
    names = iter(weights)
    groups = []
    for group in optimizer['param_groups']:
        if group.get('param_names'):
            groups.append(list(group['param_names']))
            continue
        group_names = []
        for key in group['params']:
            state = optimizer['state'].get(key, {}).values()
            shapes = [t.shape for t in state if isinstance(t, torch.Tensor) and t.dim()]
            name = next((n for n in names if not shapes or weights[n].shape == shapes[0]), None)
            if name is None:
                raise CheckpointMismatch(
                    f'parameter {key} of its optimizer fits no tensor of its model in order: only '
                    'checkpoints whose optimizer follows the order of the model can be compared'
                )
            group_names.append(name)
        groups.append(group_names)
    return groups


def _strip(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix('module.'): tensor for name, tensor in weights.items()}


def _flats(where: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Flat]:
    return {name: Flat.of(f'{where}: {name}', tensor) for name, tensor in tensors.items()}


def _prefix(prefix: str, flats: Mapping[str, Flat]) -> dict[str, Flat]:
    return {f'{prefix}/{name}': flat for name, flat in flats.items()}


def _of_optimizer(state: Mapping[str, Mapping[str, _T]]) -> dict[str, _T]:
    return {f'optimizer/{n}/{key}': v for n, values in state.items() for key, v in values.items()}
