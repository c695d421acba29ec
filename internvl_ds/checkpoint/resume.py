"""The ways to go on training from a checkpoint: DeepSpeed's own load, by name, from one file."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from yacs.config import CfgNode

from internvl_ds.checkpoint.checkpoint_engine import install_writer
from internvl_ds.checkpoint.formats.pth_format import schedule_of_original, state_of_file
from internvl_ds.checkpoint.formats.state_json import require_state
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.layout import layout_of_engine
from internvl_ds.checkpoint.optimizer_state import (
    RunningOptimizer,
    SavedTensor,
    require_optimizer,
)
from internvl_ds.checkpoint.reshard import Restorer
from internvl_ds.checkpoint.restore_scheduler import (
    fit_to_groups,
    require_schedule,
    restore_schedule,
    set_lr_of_schedule,
)
from internvl_ds.checkpoint.sources.weight_files import open_source
from internvl_ds.config.tree import checkpoint_option
from internvl_ds.dist.process_group import collectives_within
from internvl_ds.dist.rendezvous import agree, rank
from internvl_ds.engine.optimizer_trial import NUMBER, Kept, forms_of, like, state_of_optimizer
from internvl_ds.engine.param_groups import MergedGroups
from internvl_ds.engine.registry import (
    applied_updates,
    engine_of,
    registration_of,
    wrapper_of,
)
from internvl_ds.engine.scheduling import restore_schedule_position, warn_of_slow_schedule
from internvl_ds.errors import CheckpointError, PretrainedError, brief
from internvl_ds.files.reading import interpreting
from internvl_ds.zero.lazy_tensor import NamedState
from internvl_ds.zero.wrapper import Wrapper


def open_file(resume: str) -> Mapping[str, Any]:
    """Opens a .pth, or downloads one.

    Raises:
        CheckpointError: when it cannot be read, or is more than data.
    """
    try:
        return open_source(resume)
    except PretrainedError as error:
        raise CheckpointError(str(error)) from error


def train_from_file(
    config: CfgNode,
    resume: str,
    model: Any,
    lr_scheduler: Any,
    scaler: Any,
    logger: logging.Logger,
) -> float:
    """Goes on from an original's .pth. Every rank reads its own part of it."""
    engine = engine_of(model)
    require_optimizer(wrapper_of(engine).client)
    io_timeout = checkpoint_option(config, 'IO_TIMEOUT')
    merged = registration_of(engine).client_groups
    now = _names_of(merged)

    def read() -> tuple[NamedState, dict[str, Any], dict[str, float]]:
        checkpoint = open_file(resume)
        with interpreting(resume, CheckpointError):
            saved = state_of_file(checkpoint, resume, [merged.names, now])
            schedule = checkpoint.get('lr_scheduler')
            settings = checkpoint['optimizer']['param_groups']
            groups = merged.names if len(merged.names) == len(settings) else now
            if schedule is not None and lr_scheduler is not None:
                schedule = fit_to_groups(schedule, groups, lr_scheduler.state_dict(), now)
            state = {
                'epoch': checkpoint.get('epoch'),
                'lr_scheduler': schedule,
                'schedule': checkpoint.get('schedule') or schedule_of_original(checkpoint),
                'scaler': checkpoint.get('amp') or None,
                'max_accuracy': float(checkpoint.get('max_accuracy') or 0.0),
            }
            require_state(state, resume)
            require_schedule(state, lr_scheduler, resume)
            return saved, state, _lrs(groups, settings)

    saved, state, lrs = agree('read file', read, io_timeout, CheckpointError)
    _restore(engine, saved, lambda: None, io_timeout, logger)
    _finish_restoring(config, engine, state, lrs, lr_scheduler, scaler, resume, logger)
    logger.info('=> loaded successfully %s (epoch %s)', resume, state['epoch'])
    return state['max_accuracy']


def load_other_layout(
    config: CfgNode,
    engine: DeepSpeedEngine,
    shards: TagShards,
    state: dict[str, Any],
    lr_scheduler: Any,
    scaler: Any,
    ready: Callable[[], None],
    io_timeout: float,
    logger: logging.Logger,
) -> None:
    """Goes on from a tag that DeepSpeed itself could not load into this engine.

    Args:
        ready: called on all ranks when all is checked, before anything is changed.
    """
    now = _names_of(registration_of(engine).client_groups)

    def read() -> tuple[NamedState, dict[str, Any], dict[str, float]]:
        saved_by = str(state.get('optimizer_class') or '')
        with interpreting(shards.tag, CheckpointError):
            saved, settings = shards.named_state(now), shards.settings()
            groups = [group['param_names'] for group in settings]
            schedule = state.get('lr_scheduler')
            if schedule is not None and lr_scheduler is not None and all(map(all, groups)):
                schedule = fit_to_groups(schedule, groups, lr_scheduler.state_dict(), now)
            fitted = {**state, 'lr_scheduler': schedule}
            return dataclasses.replace(saved, optimizer=saved_by), fitted, _lrs(groups, settings)

    saved, state, lrs = agree('read shards', read, io_timeout, CheckpointError)
    _restore(engine, saved, ready, io_timeout, logger)
    batch, own_batch = shards.ds_config.get('train_batch_size'), engine.train_batch_size()
    if isinstance(batch, int) and batch != own_batch:
        logger.warning(
            '%s: saved with a global batch of %d, and this run has %d: an epoch has another number '
            'of updates now, and the schedule counts updates. To keep the batch, change '
            'DATA.BATCH_SIZE or TRAIN.ACCUMULATION_STEPS with the number of ranks.',
            shards.tag,
            batch,
            own_batch,
        )
    _finish_restoring(config, engine, state, lrs, lr_scheduler, scaler, shards.tag, logger)


def _restore(
    engine: DeepSpeedEngine,
    saved: NamedState,
    ready: Callable[[], None],
    io_timeout: float,
    logger: logging.Logger,
) -> None:
    def check() -> Restorer:
        with interpreting(saved.where, CheckpointError):
            return Restorer(engine, saved)

    restorer = agree('check state', check, io_timeout, CheckpointError)
    ready()
    for warning in restorer.warnings:
        logger.warning(warning)
    logger.info('%s: from %s to %s', saved.where, saved.layout, layout_of_engine(engine))
    with collectives_within(io_timeout):
        agree('restore state', restorer.restore, io_timeout, CheckpointError)


def _finish_restoring(
    config: CfgNode,
    engine: DeepSpeedEngine,
    state: Mapping[str, Any],
    lrs: Mapping[str, float],
    lr_scheduler: Any,
    scaler: Any,
    path: object,
    logger: logging.Logger,
) -> None:
    registration = registration_of(engine)
    wrapper, scheduler = registration.wrapper, registration.scheduler
    wrapper.restore_scale(state.get('loss_scale') or state.get('scaler'))
    restored = restore_schedule(config, state, lr_scheduler, scaler, path, logger)
    groups = wrapper.client.param_groups
    position = restore_schedule_position(engine, state.get('schedule'), restored)
    if lr_scheduler is None or lr_scheduler is scheduler:
        set_lr_of_schedule(scheduler, groups, position)
    else:  # the script steps it, and knows what it counts: each group has the lr that it had
        set_lr_of_schedule(lr_scheduler, groups, applied_updates(engine))
        present = _names_of(registration.client_groups)
        for group, names in zip(groups, present, strict=True):
            had = {lrs.get(name) for name in names}
            group['lr'] = group['lr'] if len(had) > 1 or None in had else had.pop()
    if isinstance(state.get('epoch'), int) and state.get('step') is None:
        warn_of_slow_schedule(engine, config, state['epoch'] + 1, logger)


def _lrs(groups: list[list[str]], settings: list[dict[str, Any]]) -> dict[str, float]:
    """Parameter -> the lr that its group was saved with."""
    return {
        name: group['lr']
        for names, group in zip(groups, settings, strict=True)
        for name in names
        if 'lr' in group
    }


def _names_of(merged: MergedGroups) -> list[list[str]]:
    """The names of each group's parameters as the groups are now."""
    groups: list[list[str]] = [[] for _ in merged.origins]
    for names, index in zip(merged.names, merged.became, strict=True):
        groups[index] += names
    return groups


def load_same_layout(
    engine: DeepSpeedEngine,
    shards: TagShards,
    saved_by: str,
    ready: Callable[[], None],
    io_timeout: float,
    logger: logging.Logger,
) -> None:
    """Goes on from a tag as DeepSpeed itself does.

    Args:
        saved_by: the class of the optimizer that it was saved with; '' where it does not say.
        ready: called on all ranks when all is checked, before anything is changed.
    """
    wrapper, path = wrapper_of(engine), shards.tag
    writer, client = install_writer(engine), wrapper.client

    def open_own_files() -> tuple[list[str], list[Kept | None]]:
        # Before any rank changes state or enters a collective: can this rank read its shards, and
        # are they the running optimizer's?
        with interpreting(path, CheckpointError):
            for files in (shards.model_files, shards.optim_files):
                if files:
                    writer.open(_own_file(files), shards)
            found = _require_same_optimizer(wrapper, shards, saved_by)
            if shards.zero_stage:
                own = shards.read(shards.optim_files[rank()])['optimizer_state_dict']
                _require_like(own, engine.optimizer.state_dict(), 'its optimizer_state_dict')
            return found

    def load() -> None:
        with (
            interpreting(path, CheckpointError),
            wrapper.loading(str(_own_file(shards.model_files))),
            collectives_within(io_timeout),
        ):
            loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise CheckpointError(f'{path}: DeepSpeed found nothing to load in it')
        state = state_of_optimizer(client)
        _into_buffers(state, buffers)
        for (group, tensor), own in zip(wrapper.slots(), kept, strict=True):
            _in_own_form(state.get(tensor) or {}, group, own)

    try:
        warnings, kept = agree('read shards', open_own_files, io_timeout, CheckpointError)
        for warning in warnings:
            logger.warning(warning)
        counted = {key for own in kept if own for key in own.counters}
        keys = client.defaults.keys() - {'lr'} - counted
        running = [{k: g[k] for k in keys & g.keys()} for g in engine.optimizer.param_groups]
        buffers = {
            parameter: dict(tensors) for parameter, tensors in state_of_optimizer(client).items()
        }
        ready()
        agree('load shards', load, io_timeout, CheckpointError)
    finally:
        writer.close()
    # Those of the running configuration hold; the lr is the scheduler's.
    for group, own in zip(engine.optimizer.param_groups, running, strict=True):
        group.update(own)


def _own_file(files: Sequence[Path]) -> Path:
    """Of one kind of shards, the file that this rank reads."""
    return files[min(rank(), len(files) - 1)]


def _require_like(saved: Any, running: Any, what: str) -> None:
    """Makes sure that DeepSpeed will meet the kinds of values that it would save now.

    Raises:
        TypeError: names the first that is of another kind.
    """
    alike = True
    if isinstance(running, Mapping):
        alike = isinstance(saved, Mapping)
        for key in running.keys() & saved.keys() if alike else ():
            _require_like(saved[key], running[key], f'{what}/{key}')
    elif isinstance(running, list | tuple):
        alike = isinstance(saved, list | tuple) and len(saved) == len(running)
        for index, pair in enumerate(zip(saved, running, strict=True) if alike else ()):
            _require_like(*pair, f'{what}/{index}')
    elif isinstance(running, torch.Tensor) and running.dim():
        alike = isinstance(saved, torch.Tensor) and saved.shape == running.shape
    elif isinstance(running, int | float | torch.Tensor):  # some count in tensors
        alike = isinstance(saved, int | float | None) or getattr(saved, 'shape', None) == ()
    elif isinstance(running, str):
        alike = isinstance(saved, str | None)
    elif running is not None:  # a loss scaler, of either class
        plain = Mapping | list | tuple | torch.Tensor | int | float | str | None
        alike = not isinstance(saved, plain)
    if not alike:
        raise TypeError(f'{what} is {brief(saved)}')


def _require_same_optimizer(
    wrapper: Wrapper, shards: TagShards, saved_by: str
) -> tuple[list[str], list[Kept | None]]:
    """Compares a tag of the same layout with the running optimizer; see `RunningOptimizer`.

    Returns:
        Warnings, and what the optimizer keeps for each of its tensors.
    """
    optimizer, stage = RunningOptimizer(wrapper.client), shards.zero_stage
    groups = shards.groups()
    names = groups if stage else [[name] for group in groups for name in group]
    found = []
    slots = zip(wrapper.slots(), shards.optimizer_state(rank()), names, strict=True)
    for index, ((group, tensor), saved, own) in enumerate(slots):
        # A partition is flat whatever the parameters' shapes, and not here where it is on NVMe.
        shape = None if stage else tensor.shape
        own = [name for name in own if name] or [f'parameter {index}']
        held = SavedTensor(own, forms_of(saved.state, shape), saved.settings)
        found.append((held, group, tensor if tensor is not None else torch.empty(0)))
    warnings = optimizer.require_saved_by(str(shards.tag), saved_by, shards.fresh, found)
    return warnings, [optimizer.kept(group, tensor) for _, group, tensor in found]


def _in_own_form(state: dict[str, Any], group: Mapping[str, Any], kept: Kept | None) -> None:
    """Gives the numbers of a tensor the form that this optimizer keeps them in.

    DeepSpeed's Adam for the CPU counts in an int, torch's in a tensor, apex's in the group.
    """
    if kept is None or not state:
        return
    for key in (key for key, form in kept.forms.items() if form == NUMBER):
        if key in state or key in group:
            state[key] = like(state.get(key, group.get(key)), kept.numbers[key])


@torch.no_grad()
def _into_buffers(state: Mapping[Any, dict[str, Any]], buffers: Mapping[Any, Any]) -> None:
    """Copies loaded optimizer state into the memory that held it before, or into memory of its own.

    torch's optimizers take over the tensors that they are given, which here are the file, mapped
    into memory.
    """
    for parameter, tensors in state.items():
        before = buffers.get(parameter, {})
        for key, loaded in tensors.items():
            if not isinstance(loaded, torch.Tensor) or loaded.device.type != 'cpu':
                continue
            own = before.get(key)
            fits = isinstance(own, torch.Tensor) and own.device == loaded.device
            if fits and (own.shape, own.dtype) == (loaded.shape, loaded.dtype):
                tensors[key] = own.copy_(loaded)
            else:
                tensors[key] = loaded.clone()
