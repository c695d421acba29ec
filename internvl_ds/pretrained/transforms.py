"""The steps that adapt a checkpoint to a model: a state dict in, another out, nothing else touched.

A step sees the model only as plain data, the shape and dtype of each of its entries, and says
what it did in notes that the caller logs. The checkpoint's mapping is never changed in place, and a
value is read only where its size has to change: it may be a tensor mapped from a file, or a `Flat`,
which lies in shards.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_ds.errors import PretrainedError
from internvl_ds.zero.lazy_tensor import Flat

State = Mapping[str, Any]


class TensorSpec(NamedTuple):
    """The facts about one tensor of the model that the steps need.

    Attributes:
        grid: (rows, columns) over which its vectors are laid out, where the model says it.
        prefix: vectors before the grid, such as a class token.
    """

    shape: torch.Size
    dtype: torch.dtype
    grid: tuple[int, int] | None = None
    prefix: int = 0


Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Note:
    """One line for the log."""

    text: str
    is_warning: bool = False


class Result(NamedTuple):
    """The result of a step: the new state dict, and notes about it."""

    state: State
    notes: tuple[Note, ...] = ()


Step = Callable[[State, Specs], Result]

_REBUILT = ('relative_position_index', 'relative_coords_table', 'attn_mask')

# InternViT in the Hugging Face naming -> the original's, which timm's vit_intern300m has too.
INTERNVIT_RENAMES = (
    (r'^embeddings\.class_embedding$', 'cls_token'),
    (r'^embeddings\.position_embedding$', 'pos_embed'),
    (r'^embeddings\.patch_embedding\.', 'patch_embed.proj.'),
    (r'^encoder\.layers\.(\d+)\.(ls[12])$', r'blocks.\1.\2.gamma'),
    (r'^encoder\.layers\.(\d+)\.', r'blocks.\1.'),
)


def rename_internvit(state: State, specs: Specs) -> Result:
    """Renames an InternViT from Hugging Face names to those of the original and timm."""
    if 'embeddings.class_embedding' not in state:
        return Result(state)
    return rename_by(INTERNVIT_RENAMES, 'InternViT: renamed')(state, specs)


def rename_by(pairs: Sequence[Sequence[str]], what: str = 'renamed') -> Step:
    """A step that renames keys by regular expressions, each pair in turn (`re.sub`)."""
    patterns = []
    for pair in pairs:
        try:
            pattern, replacement = pair
            patterns.append((re.compile(pattern), str(replacement)))
        except (ValueError, TypeError, re.error) as error:
            raise PretrainedError(
                f'MODEL.PRETRAINED_RENAME holds {pair!r}, which is no pair of a regular expression '
                f'and a replacement: {error}'
            ) from error

    def rename(state: State, specs: Specs) -> Result:
        names = {key: key for key in state}
        for pattern, replacement in patterns:
            names = {key: pattern.sub(replacement, name) for key, name in names.items()}
        count = sum(key != name for key, name in names.items())
        if not count:
            return Result(state)
        return Result(renamed(state, names), (Note(f'{what} {count} keys'),))

    return rename


def drop_rebuilt(state: State, specs: Specs) -> Result:
    """Drops the buffers that a model computes from its own sizes when it is built."""
    entries = {key: v for key, v in state.items() if not any(name in key for name in _REBUILT)}
    count = len(state) - len(entries)
    if not count:
        return Result(state)
    return Result(entries, (Note(f'dropped {count} buffers that the model builds itself'),))


def resize_bias_tables(state: State, specs: Specs) -> Result:
    """Resizes each relative_position_bias_table, (rows*columns, heads), to the model's window."""
    return _resize_all(state, specs, 'relative_position_bias_table', ndim=2, width='heads')


def resize_absolute_pos_embeds(state: State, specs: Specs) -> Result:
    """Resizes each absolute_pos_embed, (1, rows*columns, dim), to the model's grid."""
    return _resize_all(state, specs, 'absolute_pos_embed', ndim=3, width='dim')


def resize_pos_embeds(state: State, specs: Specs) -> Result:
    """Resizes timm's pos_embed, (1, prefix + rows*columns, dim), as timm does (with antialias).

    Raises:
        PretrainedError: for one over no square grid.
    """
    out, notes = dict(state), []
    for key, value in state.items():
        spec = specs.get(key)
        if key.rpartition('.')[2] != 'pos_embed' or spec is None or spec.grid is None:
            continue
        if not _is_other_grid(value, spec.shape, 3):
            continue
        length = value.shape[1] - spec.prefix
        old = math.isqrt(max(0, length))
        sizes = f'{tuple(value.shape)} in the checkpoint, {tuple(spec.shape)} in the model'
        if value.shape[2] != spec.shape[2]:
            del out[key]
            notes.append(Note(f'{key}: left out: cannot be resized: {sizes}', is_warning=True))
            continue
        if old * old != length:
            raise PretrainedError(
                f'{key} cannot be resized, as without the {spec.prefix} tokens before the grid '
                f'(class, registers) it is no square: {sizes}. Build the model as it was '
                f'(MODEL.NAME, MODEL.KWARGS), or train it anew: MODEL.PRETRAINED_RENAME '
                f"[['^{re.escape(key)}$', 'left_out']]"
            )
        from timm.layers import resample_abs_pos_embed  # takes seconds to import

        tensor = resample_abs_pos_embed(
            read(value).float(), list(spec.grid), [old, old], num_prefix_tokens=spec.prefix
        )
        out[key] = tensor.to(spec.dtype)
        notes.append(Note(f'resized {key} {old}x{old} -> {_by(spec.grid)}'))
    return Result(out, tuple(notes))


def resize_patch_embeds(state: State, specs: Specs) -> Result:
    """Resizes each patch_embed.proj.weight, (out, in, height, width), as timm does."""
    out, notes = dict(state), []
    for key, value in state.items():
        spec = specs.get(key)
        if not key.endswith('patch_embed.proj.weight') or spec is None:
            continue
        if not _is_other_grid(value, spec.shape, 4) or value.shape[:2] != spec.shape[:2]:
            continue
        from timm.layers import resample_patch_embed  # takes seconds to import

        old, new = tuple(value.shape[2:]), tuple(spec.shape[2:])
        out[key] = resample_patch_embed(read(value).float(), list(new)).to(spec.dtype)
        notes.append(Note(f'resized {key} {_by(old)} -> {_by(new)}'))
    return Result(out, tuple(notes))


def resize_grid(grid: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resizes a square grid of vectors bicubically (align_corners=False, no antialias).

    Args:
        grid: (..., old*old, width), of any floating dtype; rows run over the grid's rows first.
        size: The new rows and columns, or the new side.

    Returns:
        (..., rows*columns, width), always float32: a half-precision kernel would round every
        weight of the interpolation.
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    *lead, length, width = grid.shape
    old = math.isqrt(length)
    image = grid.float().reshape(-1, old, old, width).permute(0, 3, 1, 2)
    result = F.interpolate(image, size=(rows, columns), mode='bicubic', align_corners=False)
    return result.permute(0, 2, 3, 1).reshape(*lead, rows * columns, width)


def is_weight(value: object) -> TypeGuard[Tensor | Flat]:
    """Whether a value of a state dict is one that can be loaded."""
    return isinstance(value, Tensor | Flat)


def read(value: Tensor | Flat) -> Tensor:
    """A value of a state dict as a tensor; reads and joins shards now."""
    return value.whole() if isinstance(value, Flat) else value


def _resize_all(state: State, specs: Specs, name: str, ndim: int, width: str) -> Result:
    out: dict[str, Any] = {}
    counts: Counter[tuple[str, str]] = Counter()
    notes: list[Note] = []
    for key, value in state.items():
        spec = specs.get(key)
        if spec is None or name not in key or not _is_other_grid(value, spec.shape, ndim):
            out[key] = value
            continue
        (old_length, old_width), (new_length, new_width) = value.shape[-2:], spec.shape[-2:]
        grid = spec.grid or _square(new_length)
        old = _square(old_length)
        if old_width != new_width:
            sizes = f'{old_width} {width} in the checkpoint, {new_width} in the model'
            notes.append(Note(f'{key}: left out: {sizes}', is_warning=True))
        elif old is None or grid is None:
            sizes = f'{old_length} in the checkpoint, {new_length} in the model'
            why = f'cannot be resized, both lengths must be squares: {sizes}'
            notes.append(Note(f'{key}: left out: {why}', is_warning=True))
        else:
            out[key] = resize_grid(read(value), grid).to(spec.dtype)
            counts[_by(old), _by(grid)] += 1
    notes += [Note(f'resized {n} {name} {old} -> {new}') for (old, new), n in counts.items()]
    return Result(out, tuple(notes))


def _is_other_grid(value: Any, shape: torch.Size, ndim: int) -> bool:
    """True for a grid of the expected rank on both sides, but not of the model's shape."""
    is_grid = is_weight(value) and len(value.shape) == len(shape) == ndim
    return is_grid and value.shape != shape


def _square(length: int) -> tuple[int, int] | None:
    side = math.isqrt(length)
    return (side, side) if length > 0 and side**2 == length else None


def _by(grid: Sequence[int]) -> str:
    return 'x'.join(map(str, grid))


def renamed(state: State, names: Mapping[str, str]) -> dict[str, Any]:
    """The state under new names, of which no two may be the same."""
    new = {names[key]: value for key, value in state.items()}
    if len(new) < len(state):
        repeats = [name for name, count in Counter(names.values()).items() if count > 1]
        raise PretrainedError(
            f'several keys of the checkpoint become {repeats[0]}; MODEL.PRETRAINED_KEY may name '
            'one of the networks in it'
        )
    return new
