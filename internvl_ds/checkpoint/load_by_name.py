"""Resumes by parameter name: from a tag of another layout, or from an original's .pth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.checkpoint.direct_or_reshard import layout_of_engine
from internvl_ds.checkpoint.formats.pth_format import (
    open_file,
    schedule_of_original,
    state_of_file,
    weights_of_file,
)
from internvl_ds.checkpoint.formats.state_json import require_state
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.load_context import Load
from internvl_ds.checkpoint.optimizer_state import require_optimizer
from internvl_ds.checkpoint.reshard import Restorer
from internvl_ds.checkpoint.restore import given_by_backbone, load_weights
from internvl_ds.checkpoint.restore_scheduler import (
    adopt_lr_scales,
    fit_to_groups,
    require_schedule,
    restore_engines_own,
    restore_schedule,
    set_lr_of_schedule,
)
from internvl_ds.dist.process_group import collectives_within
from internvl_ds.engine.registry import applied_updates, engine_of, registration_of, wrapper_of
from internvl_ds.engine.scheduling import restore_schedule_position, warn_of_slow_schedule
from internvl_ds.errors import CheckpointError
from internvl_ds.files.reading import interpreting
from internvl_ds.zero.lazy_tensor import Flat, NamedState, fill
from internvl_ds.zero.partition import owned
from internvl_ds.zero.passes.unused import restore_idle


def train_from_file(load: Load, resume: str, model: Any) -> float:
    """Resumes from an original's .pth, each rank its part. Collective: every rank calls it.

    Where a .pth holds a head alone, and no optimizer, training begins with that: see
    `given_by_backbone`. Returns the saved max_accuracy.
    """
    engine = engine_of(model)
    if _is_head_alone(load, engine, resume):
        return _train_from_head(load, engine, resume)
    require_optimizer(wrapper_of(engine).client)
    client_groups = registration_of(engine).client_groups
    now = client_groups.now

    def read() -> tuple[NamedState, dict[str, Any], list[dict[str, Any]]]:
        checkpoint = open_file(resume)
        with interpreting(resume, CheckpointError):
            source = state_of_file(checkpoint, resume, [client_groups.names, now])
            settings = checkpoint['optimizer']['param_groups']
            groups = client_groups.names if len(client_groups.names) == len(settings) else now
            state = {
                'epoch': checkpoint.get('epoch'),
                'lr_scheduler': _fit_schedule(load, checkpoint.get('lr_scheduler'), groups, now),
                'schedule': checkpoint.get('schedule') or schedule_of_original(checkpoint),
                'scaler': checkpoint.get('amp') or None,
                'max_accuracy': float(checkpoint.get('max_accuracy') or 0.0),
            }
            require_state(state, resume)
            require_schedule(state, load.lr_scheduler, resume)
            return source, state, _named(groups, settings)

    source, state, settings = load.agree('read file', read)
    _restore(load, engine, source, lambda: None)
    _finish_restoring(load, engine, state, settings, resume, None)
    load.logger.info('=> loaded successfully %s (epoch %s)', resume, state['epoch'])
    return state['max_accuracy']


def _is_head_alone(load: Load, engine: DeepSpeedEngine, resume: str) -> bool:
    given = given_by_backbone(engine.module)

    def look() -> bool:
        checkpoint = open_file(resume)
        with interpreting(resume, CheckpointError):
            lacks = given - weights_of_file(checkpoint, resume).keys()
            return bool(lacks) and 'optimizer' not in checkpoint

    return bool(given) and bool(load.from_rank_0('look at file', look))


def _train_from_head(load: Load, engine: DeepSpeedEngine, resume: str) -> float:
    """Sets the head's weights, and its masters in float32; changes nothing else.

    Returns:
        0.0: no accuracy was reached in this training.
    """
    wrapper = wrapper_of(engine)

    @torch.no_grad()
    def take() -> None:
        checkpoint = open_file(resume)
        with interpreting(resume, CheckpointError):
            weights = weights_of_file(checkpoint, resume)
        load_weights(engine, weights, resume, given_by_backbone(engine.module))
        flats = {name: Flat.of(f'{resume}: {name}', t) for name, t in weights.items()}
        layout, own = wrapper.partitioning()
        for master, runs in zip(wrapper.masters().values(), owned(layout, own), strict=True):
            fill(master.data, [(n, place) for n, place in runs if n in flats], flats)
        wrapper.push_masters()

    with collectives_within(load.io_timeout):
        load.agree('read weights', take)
    load.logger.info('=> loaded the head of %s, which has no optimizer: training begins', resume)
    return 0.0


def load_other_layout(
    load: Load,
    engine: DeepSpeedEngine,
    shards: TagShards,
    state: dict[str, Any],
    ready: Callable[[], None],
) -> None:
    """Resumes from a tag of another layout. Collective: every rank calls it.

    See `load_same_layout` for the arguments.
    """
    now = registration_of(engine).client_groups.now

    def read() -> tuple[NamedState, dict[str, Any], list[dict[str, Any]]]:
        saved_by = str(state.get('optimizer_class') or '')
        with interpreting(shards.tag, CheckpointError):
            source, settings = shards.named_state(now), shards.settings()
            groups = [group['param_names'] for group in settings]
            schedule = state.get('lr_scheduler')
            if all(map(all, groups)):
                schedule = _fit_schedule(load, schedule, groups, now)
            rest = {**state, 'lr_scheduler': schedule}
            return dataclasses.replace(source, optimizer=saved_by), rest, settings

    source, state, settings = load.agree('read shards', read)
    _restore(load, engine, source, ready)
    batch, new_batch = shards.ds_config.get('train_batch_size'), engine.train_batch_size()
    if isinstance(batch, int) and batch != new_batch:
        load.logger.warning(
            f'{shards.tag}: saved with a global batch of {batch}, and this run has {new_batch}: an '
            'epoch has another number of updates now, and the schedule counts updates. To keep the '
            'batch, change DATA.BATCH_SIZE or TRAIN.ACCUMULATION_STEPS with the number of ranks.'
        )
    _finish_restoring(load, engine, state, settings, shards.tag, shards.head.get('lr_scheduler'))


def _fit_schedule(load: Load, schedule: Any, groups: list[list[str]], now: list[list[str]]) -> Any:
    """Fits a saved schedule to the current parameter groups."""
    if schedule is None or load.lr_scheduler is None:
        return schedule
    return fit_to_groups(schedule, groups, load.lr_scheduler.state_dict(), now)


def _restore(
    load: Load, engine: DeepSpeedEngine, source: NamedState, ready: Callable[[], None]
) -> None:
    def check() -> Restorer:
        with interpreting(source.where, CheckpointError):
            return Restorer(engine, source)

    restorer = load.agree('check state', check)
    ready()
    for warning in restorer.warnings:
        load.logger.warning(warning)
    load.logger.info('%s: from %s to %s', source.where, source.layout, layout_of_engine(engine))
    with collectives_within(load.io_timeout):
        load.agree('restore state', restorer.restore)


def _finish_restoring(
    load: Load,
    engine: DeepSpeedEngine,
    state: Mapping[str, Any],
    settings: list[dict[str, Any]],
    where: object,
    engines_schedule: Any,
) -> None:
    """Restores everything but tensors; last, the schedule that DeepSpeed steps."""
    lr_scheduler, logger = load.lr_scheduler, load.logger
    registration = registration_of(engine)
    wrapper, scheduler = registration.wrapper, registration.scheduler
    wrapper.restore_scale(state.get('loss_scale') or state.get('scaler'))
    is_restored = restore_schedule(load.config, state, lr_scheduler, load.scaler, where, logger)
    restore_idle(wrapper, state.get('idle'))
    groups, names_of_groups = wrapper.client.param_groups, registration.client_groups.now
    if is_restored:
        adopt_lr_scales(groups, names_of_groups, settings)
    position = restore_schedule_position(engine, state.get('schedule'), is_restored)
    if lr_scheduler is None or lr_scheduler is scheduler:
        set_lr_of_schedule(scheduler, groups, position)
    else:  # the script steps it, and knows what it counts: each group has the lr that it had
        set_lr_of_schedule(lr_scheduler, groups, applied_updates(engine))
        lrs = {n: group['lr'] for group in settings if 'lr' in group for n in group['param_names']}
        for group, names in zip(groups, names_of_groups, strict=True):
            old_lrs = {lrs.get(name) for name in names}
            group['lr'] = group['lr'] if len(old_lrs) > 1 or None in old_lrs else old_lrs.pop()
    if isinstance(state.get('epoch'), int) and state.get('step') is None:
        warn_of_slow_schedule(engine, load.config, state['epoch'] + 1, logger)
    restore_engines_own(engine, lr_scheduler, engines_schedule, where, logger)


def _named(groups: list[list[str]], settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A file's groups with the names of their parameters."""
    pairs = zip(groups, settings, strict=True)
    return [{**group, 'param_names': names} for names, group in pairs]
