"""Checkpoints of other projects and sizes that timm knows how to convert, for timm's models."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

import torch
from torch import nn

from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained.transforms import Note, Result, Specs, State, is_weight, read
from internvl_ds.zero.parameters import is_sharded, whole_shape

Filter = Callable[..., Mapping[str, Any]]


def through_timm(
    model: nn.Module, head: Sequence[str], raw: State, state: State, specs: Specs
) -> Result:
    """Converts names and sizes by the function that timm has for the model, where that helps.

    timm's ``checkpoint_filter_fn`` of a model knows OpenAI's CLIP, DINOv2, OpenCLIP and others, and
    resizes as its authors do. A checkpoint that fits already stays as it is.

    Args:
        model: its values are not read.
        head: the layers of its classifier, which may have other names and sizes.
        raw: the state with the prefixes of wrappers, which some of timm's functions look for.
        state: the same without them.
        specs: of the model.

    Raises:
        PretrainedError: when timm's function fails on names that are not the model's.
    """
    prefixes = tuple(f'{layer}.' for layer in head)
    body = {key: spec for key, spec in specs.items() if not key.startswith(prefixes)}
    fits = _fitting(state, body)
    filter_fn = filter_of(model) if fits < len(body) else None
    if filter_fn is None:
        return Result(state)
    best, failure = Result(state), None
    for source in (state, raw) if raw.keys() != state.keys() else (state,):
        try:
            entries = _filtered(filter_fn, model, source)
        except Exception as error:  # written for a handful of formats, it fails anyhow on others
            failure = failure or error
            continue
        count = _fitting(entries, body)
        if count > fits:
            text = f"timm's checkpoint_filter_fn: {fits} -> {count} entries fit the model"
            best, fits = Result(entries, (Note(text),)), count
    if failure is None or best.notes:
        return best
    text = (
        f'checkpoint_filter_fn of {type(model).__module__} cannot take this checkpoint '
        f'({type(failure).__name__}: {failure})'
    )
    if any(key not in state for key in body) and any(key not in specs for key in state):
        raise PretrainedError(f'{text}; set MODEL.PRETRAINED_RENAME') from failure
    return Result(state, (Note(text, is_warning=True),))


def filter_of(model: nn.Module) -> Filter | None:
    """The function by which timm converts checkpoints of a model, with its arguments.

    timm hands it to the builder of a model and keeps it nowhere, so the model's own entry point is
    called with a builder that only looks. A model that is none of timm's gets the
    ``checkpoint_filter_fn`` of the module of its class, if there is one.
    """
    settings = getattr(model, 'pretrained_cfg', None)
    name = settings.get('architecture') if isinstance(settings, Mapping) else None
    if 'timm' in sys.modules and isinstance(name, str):
        import timm

        if timm.is_model(name):
            return _filter_by_name(name)
    return getattr(sys.modules.get(type(model).__module__), 'checkpoint_filter_fn', None)


class _Looked(Exception):
    """Ends the building of a model whose settings are known."""


def _filter_by_name(name: str) -> Filter | None:
    from timm.models import model_entrypoint

    settings: dict[str, Any] = {}

    def look(*_: Any, **more: Any) -> NoReturn:
        settings.update(more)
        raise _Looked

    with ExitStack() as stack:
        for module in [m for n, m in sys.modules.items() if n.startswith('timm.models.')]:
            if builder := getattr(module, 'build_model_with_cfg', None):
                stack.callback(setattr, module, 'build_model_with_cfg', builder)
                module.__dict__['build_model_with_cfg'] = look
        with suppress(_Looked):
            model_entrypoint(name)(pretrained=False)
    return settings.get('pretrained_filter_fn')


def _filtered(filter_fn: Filter, model: nn.Module, state: State) -> State:
    tensors = {
        key: _wide(key, read(value)) if is_weight(value) else value for key, value in state.items()
    }
    takes_model = len(inspect.signature(filter_fn).parameters) > 1
    with _whole_shapes(model), torch.random.fork_rng(devices=[]):
        return filter_fn(tensors, model) if takes_model else filter_fn(tensors)


def _fitting(state: State, specs: Specs) -> int:
    """How many entries of the model the state has in their shapes."""
    return sum(
        is_weight(value := state.get(key)) and value.shape == spec.shape
        for key, spec in specs.items()
    )


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
