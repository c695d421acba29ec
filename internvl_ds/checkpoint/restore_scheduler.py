"""What a resumed run takes over beside its tensors: lr schedule, loss scale and epoch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from yacs.config import CfgNode

from internvl_ds.config.tree import set_options
from internvl_ds.engine.param_groups import PER_GROUP_LISTS
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.errors import CheckpointError, brief, few


def require_schedule(state: Mapping[str, Any], lr_scheduler: Any, where: object) -> None:
    """Raises CheckpointError for a value of the saved schedule of another kind than it has now."""
    saved = state.get('lr_scheduler')
    if saved is None or lr_scheduler is None:
        return
    running = lr_scheduler.state_dict()
    for key in sorted(saved.keys() & running.keys()):
        kinds = {_kind(saved[key]), _kind(running[key])}
        if None not in kinds and len(kinds) > 1:
            raise CheckpointError(
                f'{where}: {key} of its lr schedule is {brief(saved[key])}, where the configured '
                f'{type(lr_scheduler).__name__} has {brief(running[key])}'
            )
    if hasattr(lr_scheduler, 'step_update'):
        _try_schedule(lr_scheduler, saved, running, where)


def _try_schedule(
    lr_scheduler: Any, saved: Mapping[str, Any], running: Mapping[str, Any], where: object
) -> None:
    """Reads the lr of a copy of timm's schedule with the saved values; raises if it cannot."""
    pct = saved.get('noise_pct')
    if isinstance(pct, int | float) and not pct >= 1e-4:  # timm draws until one lies within it
        raise CheckpointError(f'{where}: noise_pct of its lr schedule is {pct!r}, below 0.0001')
    trial = copy.copy(lr_scheduler)
    groups = [dict(group) for group in lr_scheduler.optimizer.param_groups]
    trial.optimizer = SimpleNamespace(param_groups=groups)
    try:
        trial.load_state_dict({key: saved[key] for key in saved if key in running})
        for updates in (0, 1, 10**6):
            trial.step_update(updates)
            trial.step(updates)
    except Exception as error:  # the file's values lie in timm's own code by now
        raise CheckpointError(
            f'{where}: its lr schedule gives no lr: {type(error).__name__}: {error}'
        ) from error


def _kind(value: Any) -> str | None:
    """Roughly what a value is; None for what may stand in for anything."""
    if isinstance(value, list | tuple):
        kinds = sorted({kind for v in value if (kind := _kind(v))})
        return f'list of {kinds}' if kinds else None
    kinds_of = {'mapping': Mapping, 'number': int | float, 'text': str}
    return next((kind for kind, types in kinds_of.items() if isinstance(value, types)), None)


def restore_schedule(
    config: CfgNode,
    state: Mapping[str, Any],
    lr_scheduler: Any,
    scaler: Any,
    path: object,
    logger: logging.Logger,
) -> bool:
    """Restores scheduler and scaler, and sets TRAIN.START_EPOCH.

    Returns whether the schedule equals the saved one.
    """
    is_restored = False
    if state.get('lr_scheduler') is not None and lr_scheduler is not None:
        is_restored = _restore_scheduler(lr_scheduler, state['lr_scheduler'], path, logger)
    elif lr_scheduler is not None:
        logger.warning('%s has no state of the lr scheduler: it goes on by itself', path)
    elif state.get('lr_scheduler') is not None:
        logger.warning('%s has the state of an lr scheduler, and this run has none', path)
    if state.get('scaler') is not None and scaler is not None:
        scaler.load_state_dict(state['scaler'])
    if isinstance(state.get('epoch'), int):
        # a tag saved inside an epoch goes on with that epoch
        epoch = state['epoch'] + (state.get('step') is None)
        set_options(config, {'TRAIN.START_EPOCH': epoch})
    else:
        logger.warning(
            '%s does not say its epoch: TRAIN.START_EPOCH stays %s', path, config.TRAIN.START_EPOCH
        )
    return is_restored


def restore_engines_own(
    engine: DeepSpeedEngine, lr_scheduler: Any, saved: Any, where: object, logger: logging.Logger
) -> None:
    """Moves the schedule that DeepSpeed itself steps to where the engine is, its lr too.

    Args:
        engine: with its counters restored.
        lr_scheduler: the schedule that is restored otherwise.
        saved: the state of DeepSpeed's schedule in the checkpoint, or None: the schedule begins
            anew, with a warning.
    """
    schedule, updates = engine.lr_scheduler, engine.global_steps - engine.skipped_steps
    if schedule is None or schedule is lr_scheduler or updates == 0:
        return
    if hasattr(schedule, 'last_batch_iteration'):  # DeepSpeed's kinds; the first update is 0
        schedule.step(updates - 1)
    elif isinstance(saved, Mapping) and saved.keys() == schedule.state_dict().keys():
        schedule.load_state_dict(saved)
        set_lr_of_schedule(schedule, wrapper_of(engine).client.param_groups, updates)
    else:
        kind = type(schedule).__name__
        logger.warning('%s has no state of %s, which DeepSpeed steps: begun anew', where, kind)


def fit_to_groups(
    saved: Mapping[str, Any],
    saved_groups: Sequence[Sequence[str]],
    running: Mapping[str, Any],
    groups: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """A scheduler's state whose lists have one entry per parameter group, for other groups.

    A group takes a value over only where all its parameters had it; else it keeps its own.

    Args:
        saved, running: the state dicts of the saved scheduler and of the running one.
        saved_groups, groups: the names of the parameters of each of their groups.
    """
    state = dict(saved)
    for key in PER_GROUP_LISTS & saved.keys():
        values, values_of_now = saved[key], running.get(key)
        if not isinstance(values, list):
            continue
        if len(values) != len(saved_groups):
            state[key] = running.get(key, values)
            continue
        pairs = zip(saved_groups, values, strict=True)
        value_of = {name: value for names, value in pairs for name in names}
        state[key] = values_of_now[: len(groups)] if isinstance(values_of_now, list) else []
        state[key] += [None] * (len(groups) - len(state[key]))
        for index, names in enumerate(groups):
            old = [value_of.get(name) for name in names]
            if old and old[0] is not None and all(value == old[0] for value in old):
                state[key][index] = old[0]
    return state


def adopt_lr_scales(
    groups: Sequence[dict[str, Any]],
    names: Sequence[Sequence[str]],
    saved: Sequence[Mapping[str, Any]],
) -> None:
    """Gives groups timm's ``lr_scale`` that they were saved with, for the schedule saved with it.

    Earlier versions of the training program kept layer decay so. Groups that have one of their own
    keep it.

    Args:
        groups: the optimizer's.
        names: of the parameters of each.
        saved: the groups of the checkpoint, with their ``param_names``.
    """
    scales = {name: group.get('lr_scale') for group in saved for name in group['param_names']}
    for group, members in zip(groups, names, strict=True):
        had = {scales.get(name) for name in members}
        if len(had) == 1 and None not in had:
            group.setdefault('lr_scale', had.pop())


def set_lr_of_schedule(
    lr_scheduler: Any, param_groups: Sequence[dict[str, Any]], position: float
) -> None:
    """Gives each group the lr that a restored schedule has at a position, in what it counts."""
    if lr_scheduler is None:
        return
    if hasattr(lr_scheduler, 'step_update'):
        lr_scheduler.step_update(position)  # timm's; one that counts epochs leaves the lr alone
        return
    lrs = getattr(lr_scheduler, '_last_lr', None) or []
    if len(lrs) == len(param_groups):
        for group, lr in zip(param_groups, lrs, strict=True):
            group['lr'] = lr


def _restore_scheduler(
    lr_scheduler: Any, saved: Mapping[str, Any], path: object, logger: logging.Logger
) -> bool:
    """Restores a schedule as it was saved, with a warning where it differs; not of another kind."""
    running = lr_scheduler.state_dict()
    more, less = sorted(saved.keys() - running.keys()), sorted(running.keys() - saved.keys())
    if more and less:
        # timm's is given the number of updates, torch's counts for itself
        goes_on = hasattr(lr_scheduler, 'step_update')
        logger.warning(
            f'{path}: its lr schedule is of another kind than the configured '
            f'{type(lr_scheduler).__name__} (it has {few(more)}, and no {few(less)}), which '
            f'{"goes on by itself" if goes_on else "begins anew"}'
        )
        return False
    if more or less:  # of another version of its library
        surplus = f'{few(more)} more, which is not restored'
        difference = surplus if more else f'no {few(less)}, which stays as configured'
        logger.warning(f'{path}: the lr schedule that was saved has {difference}')
    # torch's schedulers keep their position with their settings; timm's keep none.
    position = {'last_epoch', '_step_count', '_last_lr', '_get_lr_called_within_step', 'metric'}
    keys = saved.keys() & running.keys() - position
    changes = {key: (saved[key], running[key]) for key in keys if saved[key] != running[key]}
    if changes:
        logger.warning(
            f'{path}: the lr schedule goes on as it was saved; (saved, configured now) differ in '
            f'{changes}'
        )
    lr_scheduler.load_state_dict({key: saved[key] for key in saved if key in running})
    return True
