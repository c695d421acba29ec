"""The steps that adapt a checkpoint to a model: a state dict in, another out, nothing else touched.

A step sees the model only as plain data, the shape and dtype of each of its entries, and says
what it did in notes that the caller logs. The checkpoint's mapping is never changed in place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_ds.errors import PretrainedError

State = Mapping[str, Any]


class TensorSpec(NamedTuple):
    """What the steps need to know of one tensor of the model."""

    shape: torch.Size
    dtype: torch.dtype


Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Note:
    """One line for the log."""

    text: str
    is_warning: bool = False


class Result(NamedTuple):
    """What a step hands on: the new state dict, and what there is to say about it."""

    state: State
    notes: tuple[Note, ...] = ()


Step = Callable[[State, Specs], Result]

_REBUILT = ('relative_position_index', 'relative_coords_table', 'attn_mask')
_SIM_RENAMES = {
    'fc_norm.weight': 'clip.classifier_ln.weight',
    'fc_norm.bias': 'clip.classifier_ln.bias',
    'head.weight': 'clip.classifier.weight',
    'head.bias': 'clip.classifier.bias',
}


def unwrap(state: State, specs: Specs) -> Result:
    """Takes the state dict out of a checkpoint: under ``model``, else ``module``, else itself."""
    name = next((n for n in ('model', 'module') if isinstance(state.get(n), Mapping)), None)
    inner: State = state if name is None else state[name]
    odd = next((key for key in inner if not isinstance(key, str)), None)
    if odd is not None:
        raise PretrainedError(f'not a state dict: {odd!r} is a key, and keys are names')
    if name is None:
        return Result(inner)
    return Result(inner, (Note(f'took the {len(inner)} entries under {name!r}'),))


def take_student(state: State, specs: Specs) -> Result:
    """Keeps the student of a student-teacher checkpoint, which its first key gives away."""
    first = _first_key(state)
    if 'student' not in first and 'teacher' not in first:
        return Result(state)
    kept = {
        key.replace('student.', ''): value
        for key, value in state.items()
        if 'student' in key and 'student_proj' not in key and 'teacher' not in key
    }
    return Result(kept, (Note(f'took the student: {len(kept)} of {len(state)} entries'),))


def take_sim(state: State, specs: Specs) -> Result:
    """Keeps the backbone of a SIM checkpoint, and takes its CLIP classifier as norm and head."""
    if 'mask_token' not in _first_key(state):
        return Result(state)
    kept = {
        key.replace('dcnv3.', ''): value
        for key, value in state.items()
        if ('dcnv3' in key or 'clip_projector' in key) and 'mm_dcnv3' not in key
    }
    kept |= {new: state[old] for new, old in _SIM_RENAMES.items() if old in state}
    note = Note(f'took the SIM backbone and classifier: {len(kept)} of {len(state)} entries')
    return Result(kept, (note,))


def drop_rebuilt(state: State, specs: Specs) -> Result:
    """Drops the buffers that a model computes from its own sizes when it is built."""
    kept = {key: v for key, v in state.items() if not any(name in key for name in _REBUILT)}
    dropped = len(state) - len(kept)
    if not dropped:
        return Result(state)
    return Result(kept, (Note(f'dropped {dropped} buffers that the model builds itself'),))


def resize_bias_tables(state: State, specs: Specs) -> Result:
    """Resizes each relative_position_bias_table, (side*side, heads), to the model's side."""
    return _resize_all(state, specs, 'relative_position_bias_table', ndim=2, width='heads')


def resize_pos_embeds(state: State, specs: Specs) -> Result:
    """Resizes each absolute_pos_embed, (1, side*side, dim), to the model's grid."""
    return _resize_all(state, specs, 'absolute_pos_embed', ndim=3, width='dim')


def resize_grid(grid: Tensor, side: int) -> Tensor:
    """Resizes a square grid of vectors bicubically (align_corners=False, no antialias).

    Args:
        grid: (..., old*old, width), of any floating dtype; rows run over the grid's rows first.
        side: The new side.

    Returns:
        (..., side*side, width), always float32: a half-precision kernel would round every weight
        of the interpolation.
    """
    *lead, length, width = grid.shape
    old = math.isqrt(length)
    image = grid.float().reshape(-1, old, old, width).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=(side, side), mode='bicubic', align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(*lead, side * side, width)


def _resize_all(state: State, specs: Specs, name: str, ndim: int, width: str) -> Result:
    out: dict[str, Any] = {}
    resized: Counter[tuple[int, int]] = Counter()
    notes: list[Note] = []
    for key, value in state.items():
        spec = specs.get(key)
        if spec is None or name not in key or not _is_other_grid(value, spec.shape, ndim):
            out[key] = value
            continue
        (old_length, old_width), (new_length, new_width) = value.shape[-2:], spec.shape[-2:]
        if old_width != new_width:
            sizes = f'{old_width} {width} in the checkpoint, {new_width} in the model'
            notes.append(Note(f'{key}: left out: {sizes}', is_warning=True))
        elif not _is_square(old_length) or not _is_square(new_length):
            sizes = f'{old_length} in the checkpoint, {new_length} in the model'
            why = f'cannot be resized, both lengths must be squares: {sizes}'
            notes.append(Note(f'{key}: left out: {why}', is_warning=True))
        else:
            out[key] = resize_grid(value, math.isqrt(new_length)).to(spec.dtype)
            resized[old_length, new_length] += 1
    notes += [Note(f'resized {n} {name} {old} -> {new}') for (old, new), n in resized.items()]
    return Result(out, tuple(notes))


def _is_other_grid(value: Any, shape: torch.Size, ndim: int) -> bool:
    """True for a grid of the expected rank on both sides, but not of the model's shape."""
    is_grid = isinstance(value, Tensor) and value.ndim == len(shape) == ndim
    return is_grid and value.shape != shape


def _is_square(length: int) -> bool:
    return length > 0 and math.isqrt(length) ** 2 == length


def _first_key(state: State) -> str:
    return next(iter(state), '')
