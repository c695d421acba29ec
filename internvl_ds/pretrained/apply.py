"""Writing a state dict into a module, plain or built under zero.Init: whether, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from internvl_ds.errors import PretrainedError, few
from internvl_ds.pretrained.transforms import Note, Specs, State, TensorSpec, is_weight, read
from internvl_ds.zero.lazy_tensor import Flat
from internvl_ds.zero.parameters import (
    copy_slice,
    is_sharded,
    local_values,
    unwritable,
    whole_shape,
)
from internvl_ds.zero.sharded_build import settle

_HEAD_SCALE = 0.001


def require_writable(model: nn.Module, caller: str, in_engine: bool = False) -> None:
    """Raises PretrainedError, saying what to do instead, for a model that holds weights elsewhere
    too, such as an engine (but ``in_engine``, where the caller sees to it), or has no memory for
    them.
    """
    settle()
    if not in_engine and _has_engine(model):
        raise PretrainedError(
            f'call {caller} before initialize: this {type(model).__name__} belongs to a DeepSpeed '
            f'engine already, whose optimizer may keep copies of the weights that would not follow'
        )
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise PretrainedError(f'{caller}: parameters without memory (meta device): {few(meta)}')
    for name, parameter in model.named_parameters():
        reason = unwritable(parameter)
        if reason:
            raise PretrainedError(f'{caller}: {name} {reason}')


def _has_engine(model: nn.Module) -> bool:
    if hasattr(model, 'module') and hasattr(model, 'optimizer'):
        return True
    # Every engine, of any stage, hooks the forward pass of the module that it was given.
    hooks = model._forward_pre_hooks.values()
    return any(getattr(hook, '__module__', '') == 'deepspeed.runtime.engine' for hook in hooks)


def describe(model: nn.Module) -> dict[str, TensorSpec]:
    """Shape, dtype and, where the model says it, grid of each tensor of its state dict, by key."""
    state = model.state_dict(keep_vars=True)
    specs = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            shape = whole_shape(value)
            specs[key] = TensorSpec(shape, value.dtype, *_grid_of(model, key, shape))
    return specs


def _grid_of(model: nn.Module, key: str, shape: torch.Size) -> tuple[tuple[int, int] | None, int]:
    """The grid of an embedding or table of the model, and the vectors before it."""
    path, _, name = key.rpartition('.')
    if name not in ('pos_embed', 'absolute_pos_embed', 'relative_position_bias_table'):
        return None, 0
    owner = model.get_submodule(path)
    if name == 'relative_position_bias_table':
        window = getattr(owner, 'window_size', None)
        size = None if window is None else tuple(2 * side - 1 for side in _pair(window))
        length, prefix = shape[0], 0
    else:
        embed = getattr(owner, 'patch_embed', None)
        size = getattr(embed, 'grid_size', None) or getattr(embed, 'patches_resolution', None)
        length = shape[1] if len(shape) == 3 else 0
        tokens = 0 if getattr(owner, 'no_embed_class', False) else 1
        prefix = tokens and int(getattr(owner, 'num_prefix_tokens', 0))
    if size is None:
        return None, 0
    rows, columns = _pair(size)
    return ((rows, columns), prefix) if rows * columns + prefix == length else (None, 0)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, tuple | list) else (value, value)


def require_overlap(state: State, specs: Specs, notes: Iterable[Note] = ()) -> None:
    """Raises PretrainedError when the two have no key in common.

    It names the first keys of both, and what the steps did before, by their ``notes``.
    """
    if not any(key in specs for key in state):
        steps = '; '.join(note.text for note in notes)
        raise PretrainedError(
            f'no key of the checkpoint is in the model: the checkpoint has '
            f'{few(list(state)) or "none"}{steps and f" ({steps})"}; the model has '
            f'{few(list(specs)) or "none"}. MODEL.PRETRAINED_KEY names what to take of the file, '
            'and MODEL.PRETRAINED_RENAME the names that the model has'
        )


def require_shapes(state: State, specs: Specs) -> None:
    """Raises PretrainedError, naming the first keys with both shapes, where shapes differ."""
    wrong = [
        f'{key} ({_shape(value)} in the checkpoint, {tuple(specs[key].shape)} in the model)'
        for key, value in state.items()
        if key in specs and (not is_weight(value) or value.shape != specs[key].shape)
    ]
    if wrong:
        raise PretrainedError(
            f'{len(wrong)} entries do not fit the model: {few(wrong)}. Build the model in their '
            'sizes (DATA.IMG_SIZE, MODEL.KWARGS), or leave them out by names that it lacks '
            '(MODEL.PRETRAINED_RENAME)'
        )
    odd = [
        f'{key} ({kind})'
        for key, value in state.items()
        if key in specs and (kind := _uncopied(value, specs[key]))
    ]
    if odd:
        raise PretrainedError(f'{len(odd)} entries cannot be copied into the model: {few(odd)}')


def _uncopied(value: Any, spec: TensorSpec) -> str:
    """What keeps a tensor of the right shape from being copied; '' where nothing does."""
    if not isinstance(value, Tensor):
        return ''
    if value.is_complex() and not spec.dtype.is_complex:
        return f'complex: {value.dtype}'
    kinds = {'without values': value.is_meta, 'quantized': value.is_quantized}
    kinds['sparse'] = value.layout != torch.strided
    return next((kind for kind, holds in kinds.items() if holds), '')


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if is_weight(value) else type(value).__name__


@torch.no_grad()
def rescale_head(model: nn.Module, layers: Iterable[str]) -> None:
    """Scales weight and bias of layers by 0.001, in place; of a slice each rank its own."""
    settle()
    for layer in map(model.get_submodule, layers):
        for name in ('weight', 'bias'):
            tensor = getattr(layer, name, None)
            if isinstance(tensor, Tensor):
                local_values(tensor).mul_(_HEAD_SCALE)


def load_state(model: nn.Module, state: State) -> None:
    """Copies a state dict of fitting shapes into a plain model, each tensor cast to its dtype.

    PretrainedError when torch refuses an entry; the others are loaded by then.
    """
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise PretrainedError(f'cannot be loaded: {error}') from error


@torch.no_grad()
def write(model: nn.Module, values: Iterable[tuple[str, Tensor | Flat]]) -> None:
    """Copies tensors of fitting shapes into the model one after the other, cast to its dtype.

    Each rank writes its own slice of a partitioned parameter: no rank holds more than one tensor.
    """
    targets: Mapping[str, Any] = model.state_dict(keep_vars=True)
    settle()
    for key, value in values:
        target = targets[key]
        if is_sharded(target):
            copy_slice(target, value if isinstance(value, Flat) else Flat.of(key, value))
        else:
            target.copy_(read(value))
