"""Checkpoints of other projects that timm knows how to rename, for timm's models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained.classifier import classifier_layers
from internvl_ds.pretrained.transforms import Note, Result, Specs, State, is_weight, read
from internvl_ds.zero.parameters import is_sharded, whole_shape


def through_timm(model: nn.Module, state: State, specs: Specs) -> Result:
    """Renames by the ``checkpoint_filter_fn`` that the model's own module has, where that helps.

    timm's models have one; it knows OpenAI's CLIP, DINOv2, OpenCLIP and others. Keys that fit
    already stay as they are.
    """
    filter_fn = getattr(sys.modules.get(type(model).__module__), 'checkpoint_filter_fn', None)
    head = ('head.', *(f'{layer}.' for layer in classifier_layers(model)))
    gaps = [key for key in specs if key not in state and not key.startswith(head)]
    extras = [key for key in state if key not in specs]
    if filter_fn is None or not gaps or not extras:
        return Result(state)
    tensors = {key: _wide(key, read(value)) for key, value in state.items() if is_weight(value)}
    try:
        with _whole_shapes(model), torch.random.fork_rng(devices=[]):
            new_state = filter_fn(tensors, model)
    except Exception as error:
        raise PretrainedError(
            f'checkpoint_filter_fn of {type(model).__module__} cannot take this checkpoint '
            f'({type(error).__name__}: {error}); set MODEL.PRETRAINED_RENAME'
        ) from error
    before = sum(key in specs for key in state)
    after = sum(key in specs for key in new_state)
    if after <= before:
        return Result(state)
    note = Note(f"timm's checkpoint_filter_fn: {before} -> {after} keys that the model has")
    return Result(new_state, (note,))


def _wide(key: str, value: torch.Tensor) -> torch.Tensor:
    """Casts what the function may resize to float32: it rounds to the stored dtype again."""
    is_resized = any(word in key for word in ('pos', 'patch', 'conv1'))
    return value.float() if is_resized and value.is_floating_point() else value


@contextmanager
def _whole_shapes(model: nn.Module) -> Iterator[None]:
    """Gives partitioned parameters their whole shapes for the block, without values."""
    parameters: list[Any] = [p for p in model.parameters() if is_sharded(p)]
    slices = [p.data for p in parameters]
    try:
        for p in parameters:
            p.data = torch.zeros(1, dtype=p.dtype, device=p.device).expand(whole_shape(p))
        yield
    finally:
        for p, data in zip(parameters, slices, strict=True):
            p.data = data
