"""Writing a state dict into a plain module: what may be written to, what fits, what was loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained.transforms import Specs, State, TensorSpec

_FEW = 5  # names shown where the full list would drown the log
_HEAD_SCALE = 0.001


@dataclass(frozen=True)
class LoadReport:
    """Names of the entries that were loaded, and of those that one side lacks."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def log(self, logger: logging.Logger) -> None:
        """Logs counts and the first few names; the full lists at DEBUG."""
        logger.info(f'loaded {len(self.loaded)} entries')
        for title, names in (
            ('missing from the checkpoint, left as they are in the model', self.missing),
            ('unexpected, not in the model', self.unexpected),
        ):
            if names:
                logger.warning(f'{len(names)} entries {title}: {few(names)}')
                logger.debug(f'{title}: {", ".join(names)}')


def few(names: tuple[str, ...] | list[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = f' and {len(names) - _FEW} more' if len(names) > _FEW else ''
    return ', '.join(names[:_FEW]) + more


def require_plain(model: nn.Module, caller: str) -> None:
    """Refuses what holds weights elsewhere too: an engine, its module, partitioned parameters.

    Raises:
        PretrainedError: saying what to do instead.
    """
    if _has_engine(model):
        raise PretrainedError(
            f'call {caller} before initialize: this {type(model).__name__} belongs to a DeepSpeed '
            f'engine already, whose optimizer may keep copies of the weights that would not follow'
        )
    if any(hasattr(parameter, 'ds_id') for parameter in model.parameters()):
        raise PretrainedError(
            f'{caller}: models built under deepspeed.zero.Init are not supported by this version; '
            f'build the model outside of it'
        )
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise PretrainedError(f'{caller}: parameters without memory (meta device): {few(meta)}')


def _has_engine(model: nn.Module) -> bool:
    if hasattr(model, 'module') and hasattr(model, 'optimizer'):
        return True
    # Every engine, of any stage, hooks the forward pass of the module that it was given.
    hooks = model._forward_pre_hooks.values()
    return any(getattr(hook, '__module__', '') == 'deepspeed.runtime.engine' for hook in hooks)


def describe(model: nn.Module) -> dict[str, TensorSpec]:
    """The shape and dtype of each tensor of the model's state dict, by its key."""
    state = model.state_dict()
    return {k: TensorSpec(v.shape, v.dtype) for k, v in state.items() if isinstance(v, Tensor)}


def require_overlap(state: State, specs: Specs) -> None:
    """Raises PretrainedError, naming the first keys of both, when they have no key in common."""
    if not any(key in specs for key in state):
        raise PretrainedError(
            f'no key of the checkpoint is in the model: the checkpoint has '
            f'{few(list(state)) or "none"}; the model has {few(list(specs)) or "none"}'
        )


def require_shapes(state: State, specs: Specs) -> None:
    """Raises PretrainedError, naming the first keys with both shapes, where shapes differ."""
    wrong = [
        f'{key} ({_shape(value)} in the checkpoint, {tuple(specs[key].shape)} in the model)'
        for key, value in state.items()
        if key in specs and (not isinstance(value, Tensor) or value.shape != specs[key].shape)
    ]
    if wrong:
        raise PretrainedError(f'{len(wrong)} entries do not fit the model: {few(wrong)}')


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


@torch.no_grad()
def rescale_head(model: nn.Module) -> None:
    """Scales weight and bias of ``model.head`` by 0.001, in place."""
    head = model.get_submodule('head')
    for name in ('weight', 'bias'):
        tensor = getattr(head, name, None)
        if isinstance(tensor, Tensor):
            tensor.mul_(_HEAD_SCALE)


def load_state(model: nn.Module, state: State) -> LoadReport:
    """Copies a state dict of fitting shapes into the model, each tensor cast to the model's dtype.

    Raises:
        PretrainedError: when torch refuses an entry; the others are loaded by then.
    """
    try:
        answer = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise PretrainedError(f'cannot be loaded: {error}') from error
    unexpected = set(answer.unexpected_keys)
    loaded = tuple(key for key in state if key not in unexpected)
    return LoadReport(loaded, tuple(answer.missing_keys), tuple(answer.unexpected_keys))
