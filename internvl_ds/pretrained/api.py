"""``load_pretrained`` and ``convert_22k_head_to_1k``: both run before an engine exists."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor, nn
from yacs.config import CfgNode

from internvl_ds.config import get_option
from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained import apply, head, transforms
from internvl_ds.pretrained.sources import open_source
from internvl_ds.pretrained.transforms import Result, Specs, State, Step

_M = TypeVar('_M', bound=nn.Module)

# First the keys get the model's names, then the tensors its sizes; the head comes after both.
NAMING: tuple[Step, ...] = (
    transforms.unwrap,
    transforms.take_student,
    transforms.take_sim,
    transforms.drop_rebuilt,
)
SIZING: tuple[Step, ...] = (
    transforms.resize_bias_tables,
    transforms.resize_pos_embeds,
)


def load_pretrained(config: CfgNode, model: nn.Module, logger: logging.Logger) -> None:
    """Loads the weights at MODEL.PRETRAINED into a plain module, adapted to it.

    Call it before ``initialize``, on every rank. Everything is checked before the first tensor of
    the model changes, and no random number is drawn.

    Args:
        config: Reads MODEL.PRETRAINED (a file or an https URL) and TRAIN.RAND_INIT_FT_HEAD.
        model: A module that belongs to no engine, on any device and of any dtype.
        logger: Gets a line per step that did something, and the missing and unexpected keys.

    Raises:
        PretrainedError: where the file cannot be read, has nothing in common with the model, or
            does not fit it; and where the model belongs to an engine or is partitioned.
    """
    apply.require_plain(model, 'load_pretrained')
    path = str(get_option(config, 'MODEL.PRETRAINED', ''))
    if not path:
        raise PretrainedError('MODEL.PRETRAINED is empty: there are no weights to load')
    rand_init = bool(get_option(config, 'TRAIN.RAND_INIT_FT_HEAD', False))
    source = open_source(path)
    logger.info(f'pretrained weights: {path}')
    try:
        _adapt_and_load(source, model, rand_init, logger)
    except PretrainedError as error:
        raise PretrainedError(f'{path}: {error}') from error


def convert_22k_head_to_1k(model: _M, logger: logging.Logger) -> _M:
    """Cuts an ImageNet-22K head (``model.head``, 21841 rows) to the 1000 rows of ImageNet-1K.

    The weight and bias become new parameters of the same dtype, device and requires_grad, so call
    it before an optimizer or an engine takes the parameters.

    Args:
        model: A module, or a wrapper that has it as ``.module``; changed in place.
        logger: Told what was done, or, for a head of another length, that nothing was.

    Returns:
        The same object.

    Raises:
        PretrainedError: for a DeepSpeed engine, its module, or partitioned parameters.
    """
    wrapped = getattr(model, 'module', None)
    inner = wrapped if isinstance(wrapped, nn.Module) else model
    for part in (inner, model):
        apply.require_plain(part, 'convert_22k_head_to_1k')
    layer = getattr(inner, 'head', None)
    weight = getattr(layer, 'weight', None)
    if not isinstance(layer, nn.Module) or not isinstance(weight, nn.Parameter):
        logger.warning(f'{type(inner).__name__} has no head with a weight: unchanged')
        return model
    if weight.shape[0] != head.CLASSES_22K:
        rows = f'{weight.shape[0]} rows, not {head.CLASSES_22K}'
        logger.warning(f'the head of {type(inner).__name__} has {rows}: unchanged')
        return model
    layer.weight = _take_rows(weight)
    bias = getattr(layer, 'bias', None)
    if isinstance(bias, nn.Parameter):
        layer.bias = _take_rows(bias)
    if isinstance(layer, nn.Linear):
        layer.out_features = head.CLASSES_1K
    logger.info(f'the head keeps the {head.CLASSES_1K} ImageNet-1K rows of its ImageNet-22K rows')
    return model


def _adapt_and_load(
    source: State, model: nn.Module, rand_init: bool, logger: logging.Logger
) -> None:
    specs = apply.describe(model)
    state = _run(NAMING, source, specs, logger)
    apply.require_overlap(state, specs)
    state = _run(SIZING, state, specs, logger)
    plan = head.plan_head(state, specs, rand_init)
    state = _log_notes(head.fit_head(state, plan), logger)
    apply.require_shapes(state, specs)
    if plan is head.HeadPlan.RESCALE:
        apply.rescale_head(model)
    apply.load_state(model, state).log(logger)


def _run(steps: Iterable[Step], state: State, specs: Specs, logger: logging.Logger) -> State:
    for step in steps:
        state = _log_notes(step(state, specs), logger)
    return state


def _log_notes(result: Result, logger: logging.Logger) -> State:
    for note in result.notes:
        (logger.warning if note.is_warning else logger.info)(note.text)
    return result.state


def _take_rows(parameter: Tensor) -> nn.Parameter:
    rows = head.imagenet_22k_rows().to(parameter.device)
    return nn.Parameter(parameter.detach()[rows], requires_grad=parameter.requires_grad)
