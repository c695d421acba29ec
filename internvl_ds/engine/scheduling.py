"""The lr schedule of an engine: stepped after its updates, kept by its checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from yacs.config import CfgNode

from internvl_ds.config.tree import get_option
from internvl_ds.engine.registry import applied_updates, registration_of


def step_scheduler(engine: DeepSpeedEngine, skipped: bool) -> None:
    """Moves the engine's schedule on, after an update that its unit counts.

    Args:
        skipped: whether the update was skipped.
    """
    registration = registration_of(engine)
    schedule, accumulation = registration.schedule, registration.accumulation
    # A group that something was dropped of is taken for a whole one; see Accumulation.finish.
    whole = (accumulation.last_group or 0) >= engine.gradient_accumulation_steps()
    if schedule is not None and schedule.is_due(skipped, whole):
        schedule.move(*registration.progress, engine.optimizer.param_groups)


def require_schedule_untouched(engine: DeepSpeedEngine) -> None:
    """Raises ConfigError for an lr schedule that the script steps beside the engine."""
    schedule = registration_of(engine).schedule
    if schedule is not None:
        schedule.require_untouched(engine.optimizer.param_groups)


def schedule_state(engine: DeepSpeedEngine) -> dict[str, Any] | None:
    """The schedule's state for a checkpoint, beside the scheduler's own state."""
    registration = registration_of(engine)
    schedule = registration.schedule
    return schedule.state_dict(*registration.progress) if schedule else None


def restore_schedule_position(
    engine: DeepSpeedEngine, state: Mapping[str, Any] | None, loaded: bool
) -> float:
    """Restores the position of the engine's schedule, after the number of updates.

    Args:
        state: of `schedule_state`; None for a checkpoint without one.
        loaded: whether the scheduler itself was restored from the checkpoint.

    Returns:
        Where the learning rates are, as the scheduler counts; applied updates without one.
    """
    registration = registration_of(engine)
    if registration.schedule is None:
        return applied_updates(engine)
    registration.schedule.restore(state, *registration.progress, loaded)
    return registration.schedule.moved_to


def warn_of_slow_schedule(
    engine: DeepSpeedEngine, config: CfgNode, epochs: int, logger: logging.Logger
) -> None:
    """Warns if the engine's schedule turns out not to count updates.

    Args:
        config: TRAIN.EPOCHS is read.
        epochs: that have ended.
    """
    schedule = registration_of(engine).schedule
    if schedule is not None:
        all_epochs = get_option(config, 'TRAIN.EPOCHS', 0)
        if warning := schedule.too_long(applied_updates(engine), epochs, all_epochs):
            logger.warning(warning)
