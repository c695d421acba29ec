"""The lr schedule of an engine: stepped after its updates, kept by its checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from yacs.config import CfgNode

from internvl_ds.config.tree import get_option
from internvl_ds.engine.registry import accumulation_of, applied_updates, schedule_of


def step_scheduler(engine: DeepSpeedEngine) -> None:
    """Moves the engine's schedule on, after an applied update."""
    schedule = schedule_of(engine)
    if schedule is not None:
        come = accumulation_of(engine).micro_batches
        schedule.move(applied_updates(engine), come, engine.optimizer.param_groups)


def require_schedule_untouched(engine: DeepSpeedEngine) -> None:
    """Refuses an lr schedule that the script steps beside the engine.

    Raises:
        ConfigError: when it was.
    """
    schedule = schedule_of(engine)
    if schedule is not None:
        schedule.require_untouched(engine.optimizer.param_groups)


def schedule_state(engine: DeepSpeedEngine) -> dict[str, Any] | None:
    """What a checkpoint keeps of the engine's schedule beside the scheduler's own state."""
    schedule = schedule_of(engine)
    if schedule is None:
        return None
    return schedule.state_dict(applied_updates(engine), accumulation_of(engine).micro_batches)


def restore_schedule_position(
    engine: DeepSpeedEngine, state: Mapping[str, Any] | None, loaded: bool
) -> float:
    """Puts the engine's schedule where a checkpoint has it, once the updates are restored.

    Args:
        state: of `schedule_state`; None for a checkpoint without one.
        loaded: whether the scheduler itself was restored from the checkpoint.

    Returns:
        Where the learning rates are, in what the schedule counts; applied updates without one.
    """
    schedule, updates = schedule_of(engine), applied_updates(engine)
    if schedule is None:
        return updates
    schedule.restore(state, updates, accumulation_of(engine).micro_batches, loaded)
    return schedule.moved


def warn_of_slow_schedule(
    engine: DeepSpeedEngine, config: CfgNode, epochs: int, logger: logging.Logger
) -> None:
    """Says so where updates have turned out not to be what the engine's schedule counts.

    Args:
        config: TRAIN.EPOCHS is read.
        epochs: that have ended.
    """
    schedule = schedule_of(engine)
    if schedule is not None:
        all_epochs = get_option(config, 'TRAIN.EPOCHS', 0)
        found = schedule.too_long(applied_updates(engine), epochs, all_epochs)
        if found is not None:
            logger.warning(found)
