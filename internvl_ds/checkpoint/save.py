"""save_checkpoint: the ranks meet, and collect their files for `finish_save`."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from yacs.config import CfgNode

import internvl_ds
from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.checkpoint_engine import install_writer
from internvl_ds.checkpoint.copying.copies import Memory, memories_of
from internvl_ds.checkpoint.copying.snapshot import tensor_bytes
from internvl_ds.checkpoint.finish_save import Save, abandon, finish
from internvl_ds.checkpoint.formats.ema_tensors import ema_file, warn_of_rounding
from internvl_ds.checkpoint.formats.rng import rng_state
from internvl_ds.checkpoint.frozen.apart import apart_of
from internvl_ds.checkpoint.frozen.sharing import apart_from
from internvl_ds.checkpoint.mirror.uploads import uploads
from internvl_ds.checkpoint.optimizer_state import optimizer_name
from internvl_ds.checkpoint.proof import wanted_of
from internvl_ds.checkpoint.tag import commit
from internvl_ds.checkpoint.tag.manifest import Identity, tag_name
from internvl_ds.checkpoint.tag.output_lock import enter_output
from internvl_ds.checkpoint.tag.retention import (
    KeepBest,
    KeepEvery,
    KeepLater,
    KeepNewest,
    KeepSteps,
    Policy,
)
from internvl_ds.config.choices import copies_later
from internvl_ds.config.ds.resolve import precision_of
from internvl_ds.config.tree import checkpoint_option, copy_of_tree, get_option
from internvl_ds.dist.rendezvous import exchange, from_rank_0, rank, world_size
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.engine.registry import applied_updates, engine_of, registration_of, wrapper_of
from internvl_ds.engine.scheduling import schedule_state, warn_of_slow_schedule
from internvl_ds.errors import CheckpointError, RankError, few
from internvl_ds.files.ema_shard import EmaFile
from internvl_ds.zero.module_state import require_as_made
from internvl_ds.zero.wrapper import Wrapper


def save_checkpoint(
    config: CfgNode,
    epoch: int,
    model: Any,
    max_accuracy: float,
    optimizer: Any,
    lr_scheduler: Any,
    scaler: Any,
    logger: logging.Logger,
    model_ema: Any = None,
    max_accuracy_ema: float | None = None,
    ema_decay: float | None = None,
    best: str | None = None,
    *,
    step: int | None = None,
    loop: Any = None,
    class_names: Sequence[str] | None = None,
) -> str:
    """Saves a tag under OUTPUT, each rank its own shards. Collective: every rank calls it.

    The tag appears under its name, and ``latest`` names it, once all of it is on disk with a
    checksum for every file; then the tags go that no retention policy keeps. A save that fails
    leaves what was there. With CHECKPOINT.ASYNC the call returns before the state is copied, which
    the next update waits for; the next save, a load or `shutdown` waits for the rest and its error.

    Args:
        config: OUTPUT, SAVE_CKPT_NUM and CHECKPOINT are read; all of it is kept as text.
        epoch: the epoch that has ended or, with ``step``, is under way.
        model: the engine, or its module.
        max_accuracy, max_accuracy_ema, ema_decay: kept where given.
        optimizer: the engine's optimizer; its state is in the shards.
        lr_scheduler, scaler: their ``state_dict()`` is kept; may be None.
        logger: gets a line before and after.
        model_ema: a `ShardedEma`, or timm's ModelEma, ModelEmaV2 or ModelEmaV3.
        best: a name such as 'best': the tag ``ckpt_epoch_{best}`` is not counted by retention.
        step: updates of the epoch that are done: the tag is ``ckpt_epoch_{epoch}_step_{step}``.
        loop: an object whose ``state_dict()`` is kept for each rank; may be None.
        class_names: of the labels 0, 1, ...; a load compares them.

    Returns:
        The path of the tag's directory.

    Raises:
        RankError: when a rank does not come within the limit, or with another tag.
        CheckpointError: on all ranks, when any could not write, or the save before it failed.
    """
    async_save.wait()
    engine = engine_of(model)
    wrapper = wrapper_of(engine)
    require_as_made(engine.module, wrapper.names, wrapper.buffers)
    values = {
        'epoch': epoch, 'step': step, 'max_accuracy': max_accuracy, 'ema_decay': ema_decay,
        'max_accuracy_ema': max_accuracy_ema, 'class_names': class_names, 'config': config,
    }  # fmt: skip
    save = _new_save(engine, values, best, logger)
    _begin(save, wrapper, average := ema_file(model_ema, apart_from(wrapper, config)), config)
    _warn(save, engine, config, model_ema)
    try:
        state = functools.partial(_state, save, engine, values, lr_scheduler, scaler)
        _begin_copy(save, wrapper, model_ema, config)
        _stage(save, wrapper, average, state, loop)
    except BaseException:
        abandon(save)
        raise
    if save.in_background:
        action, hurry = functools.partial(finish, save), save.writer.pace.lift
        async_save.start(save.tag, action, hurry, limit=3 * save.io_timeout)
    else:
        finish(save)
    return str(Path(config.OUTPUT) / save.tag)


def _new_save(
    engine: DeepSpeedEngine, values: Mapping[str, Any], best: str | None, logger: logging.Logger
) -> Save:
    config, epoch, step = values['config'], values['epoch'], values['step']
    registration = registration_of(engine)
    wrapper = registration.wrapper
    wrapper.require_own_weights('save_checkpoint')
    is_counted = best is None and isinstance(epoch, int)
    groups = None if wrapper.client is None else registration.client_groups.names
    writer = install_writer(engine)
    # What it is taken from is as it was made: see `require_as_made`.
    writer.wanted = replace(writer.wanted or wanted_of(wrapper, groups), groups=groups)
    return Save(
        # Absolute: the program may change its directory before a save in the background is done.
        output=Path(os.path.abspath(config.OUTPUT)),
        tag=tag_name(epoch, best, step),
        writer=writer,
        staging_path=Path(),
        header=_header(wrapper, epoch, step if is_counted else None, values['max_accuracy']),
        policies=_policies(config) if is_counted else None,
        in_background=bool(checkpoint_option(config, 'ASYNC')),
        io_timeout=checkpoint_option(config, 'IO_TIMEOUT'),
        logger=logger,
        wanted=writer.wanted,
    )


def _warn(save: Save, engine: DeepSpeedEngine, config: CfgNode, model_ema: Any) -> None:
    warn_of_rounding(model_ema, save.logger)
    registration = registration_of(engine)
    names = registration.wrapper.untrained_names()
    if names:
        save.logger.warning(
            f'{len(names)} parameters require a gradient and no optimizer trains them, because '
            f'they were frozen when the engine was made: {few(names)}. They are saved as they '
            'are. To train them, make the engine anew with an optimizer over them.'
        )
    accumulation = registration.accumulation
    if accumulation.losses and not accumulation.warned:
        accumulation.warned = True
        save.logger.warning(
            'saving between two micro-batches of one update: what they have accumulated is not '
            'kept; save after a call with update_grad=True, or after optimizer.zero_grad() where '
            'the next epoch begins with it'
        )
    if save.policies is not None and save.header['step'] is None:
        warn_of_slow_schedule(engine, config, save.header['epoch'] + 1, save.logger)


def _state(
    save: Save, engine: DeepSpeedEngine, values: Mapping[str, Any], lr_scheduler: Any, scaler: Any
) -> dict[str, Any]:
    """What goes into state.json."""

    def state_of(owner: Any) -> dict[str, Any] | None:
        return None if owner is None else owner.state_dict()

    numbers = ('max_accuracy', 'max_accuracy_ema', 'ema_decay')
    wrapper, names = wrapper_of(engine), values['class_names']
    return {
        'epoch': values['epoch'],
        'step': values['step'],
        **{key: None if values[key] is None else float(values[key]) for key in numbers},
        'lr_scheduler': state_of(lr_scheduler),
        'schedule': schedule_state(engine),
        'scaler': state_of(scaler),
        'loss_scale': state_of(wrapper.scale),
        'idle': None if wrapper.idle is None else sorted(wrapper.idle),
        'class_names': None if names is None else list(map(str, names)),
        'config': values['config'],
        # As text does: whatever DeepSpeed took of plain initialize, this keeps.
        'ds_config': json.loads(json.dumps(wrapper.ds_config, default=str)),
        'optimizer_class': None if wrapper.client is None else optimizer_name(wrapper.client),
        'optimizer_groups': save.wanted.groups,
    }


def _header(wrapper: Wrapper, epoch: Any, step: int | None, max_accuracy: float) -> dict[str, Any]:
    return {
        'epoch': epoch if isinstance(epoch, int) else None,
        'step': step,
        'max_accuracy': float(max_accuracy),
        'zero_stage': wrapper.stage,
        'world_size': world_size(),
        'precision': precision_of(wrapper.ds_config),
        'global_steps': wrapper.engine.global_steps,
        'versions': {
            'internvl_ds': internvl_ds.__version__,
            'torch': str(torch.__version__),
            'deepspeed': deepspeed.__version__,
        },
    }


def _policies(config: CfgNode) -> list[Policy]:
    count = get_option(config, 'SAVE_CKPT_NUM')
    steps = checkpoint_option(config, 'KEEP_STEPS')
    # Without auto resume a run that goes back to an older tag was told to.
    is_rewound = not get_option(config, 'TRAIN.AUTO_RESUME', True)
    return [
        KeepNewest(count),
        KeepBest(checkpoint_option(config, 'KEEP_BEST')),
        KeepEvery(checkpoint_option(config, 'KEEP_EVERY')),
        KeepSteps(steps),
        KeepLater(max(1, count + steps) if is_rewound else None),
    ]


def _begin(save: Save, wrapper: Wrapper, average: EmaFile | None, config: CfgNode) -> None:
    """Makes the staging directory of one save for all ranks. Collective: every rank calls it."""
    timeout = checkpoint_option(config, 'RENDEZVOUS_TIMEOUT')
    size = save.writer.last_size
    if size is None:
        size = tensor_bytes([*wrapper.saved_tensors(rank()), average])
        # Maybe they are there: a disk that is too full for them says so.
        size -= tensor_bytes(apart_from(wrapper, config)) if rank() == 0 else 0
    arguments = [save.tag, save.header['epoch'], str(config.OUTPUT), save.in_background]
    calls = exchange('save_checkpoint', [arguments, size], timeout, warn=save.logger.warning)
    if any(call[0] != calls[0][0] for call in calls):
        raise RankError(
            'save_checkpoint: the ranks came with different (tag, epoch, OUTPUT, '
            f'CHECKPOINT.ASYNC): {[call[0] for call in calls]}'
        )

    def make_staging() -> str:
        try:
            enter_output(save.output, config, timeout)
            _require_space(save, [call[1] for call in calls])
            age = checkpoint_option(config, 'LEFTOVER_AGE')
            save.staging = commit.begin(save.output, save.tag, age=age)
        except OSError as error:
            raise CheckpointError(
                f'{save.output / save.tag}: rank 0 cannot begin to save: {error}'
            ) from error
        return save.staging.path.name

    save.staging_path = save.output / from_rank_0('begin save', make_staging, timeout)
    save.header['save'] = save.staging_path.name.rpartition('-')[2]
    uploads().begin(config)
    save.logger.info('%s saving......', save.output / save.tag)


def _require_space(save: Save, sizes: list[int]) -> None:
    size, free = sum(sizes), shutil.disk_usage(save.output).free
    if size > free:
        most = max(range(len(sizes)), key=sizes.__getitem__)
        raise CheckpointError(
            f'{save.output / save.tag}: needs {size} bytes (rank {most} the most, '
            f'{sizes[most]}), and {free} are free: nothing was written, and the earlier '
            'checkpoints stay'
        )


def _begin_copy(save: Save, wrapper: Wrapper, model_ema: Any, config: CfgNode) -> None:
    """Readies the writer: how frozen parameters are kept, and what may be copied later."""
    writer = save.writer
    steady: set[Memory] = set()
    if save.in_background and copies_later(config):
        own = isinstance(model_ema, ShardedEma) and model_ema.engine is wrapper.engine
        steady = memories_of([wrapper.steady_tensors(), model_ema.averages() if own else []])
        wrapper.before_write = writer.finish_copy
    writer.begin(
        Identity(save.tag, save.header['save'], rank()),
        updates=applied_updates(wrapper.engine),
        in_background=save.in_background,
        apart=apart_of(wrapper, config, save.staging_path, writer, save.logger),
        steady=steady,
        limit=int(checkpoint_option(config, 'ASYNC_MEMORY') * 2**30),
        rate=checkpoint_option(config, 'ASYNC_RATE') * 1e6 if save.in_background else 0,
        patience=save.io_timeout,
    )


def _stage(
    save: Save,
    wrapper: Wrapper,
    average: EmaFile | None,
    state: Callable[[], Any],
    loop: Any,
) -> None:
    """Collects this rank's files. Collective: every rank calls it.

    A failure is kept, for all ranks to hear of later.
    """
    writer, apart = save.writer, save.writer.apart
    if not save.staging_path.is_dir():
        writer.error = CheckpointError(
            f'{save.staging_path}: made by rank 0, and not there for this rank: OUTPUT must be one '
            'directory that all hosts share'
        )
    # Meets in barriers: every rank calls it, whatever has happened.
    with (
        wrapper.saving(writer.defer),
        contextlib.nullcontext() if apart is None else wrapper.handing_over_fragments(),
    ):
        wrapper.engine.save_checkpoint(
            str(save.output), tag=save.staging_path.name, save_latest=False
        )
    if average is not None:
        writer.save(average, save.staging_path / average.name)
    try:
        loop_state = None if loop is None else loop.state_dict()
        entry = {Identity.KEY: writer.identity.to_dict()}
        save.loop = copy.deepcopy({'rng': rng_state(), 'loop': loop_state, **entry})
        if rank() == 0:
            value = state()
            config = {id(value['config']): copy_of_tree(value['config'])}  # deepcopy is slow at it
            save.state = copy.deepcopy({**value, **entry}, config)
    except Exception as error:
        writer.error = writer.error or error
    writer.seal()
