"""save_checkpoint: the ranks meet, stage their files, report, and rank 0 commits."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import deepspeed
import torch
from yacs.config import CfgNode

import internvl_ds
from internvl_ds.checkpoint import async_save as background
from internvl_ds.checkpoint.checkpoint_engine import ShardWriter, install_writer
from internvl_ds.checkpoint.formats.ema_tensors import ema_file
from internvl_ds.checkpoint.formats.rng import rng_state
from internvl_ds.checkpoint.formats.snapshot import tensor_bytes
from internvl_ds.checkpoint.formats.state_json import state_text
from internvl_ds.checkpoint.optimizer_state import optimizer_name
from internvl_ds.checkpoint.proof import Wanted, prove, wanted_of
from internvl_ds.checkpoint.tag import commit as store
from internvl_ds.checkpoint.tag.discovery import file_sizes
from internvl_ds.checkpoint.tag.hashing import flush_and_hash, write_hashed
from internvl_ds.checkpoint.tag.manifest import (
    LOOP_FILE,
    STATE_FILE,
    FileEntry,
    Header,
    Identity,
    Manifest,
    tag_name,
)
from internvl_ds.checkpoint.tag.output_lock import enter_output, note_save
from internvl_ds.checkpoint.tag.retention import (
    KeepBest,
    KeepEvery,
    KeepLater,
    KeepNewest,
    KeepSteps,
    Policy,
)
from internvl_ds.checkpoint.tag.trash import MARK
from internvl_ds.config.ds.resolve import precision_of
from internvl_ds.config.tree import checkpoint_option, get_option
from internvl_ds.dist.process_group import collectives_within
from internvl_ds.dist.rendezvous import exchange, from_rank_0, gather, rank, world_size
from internvl_ds.engine.ema_shard import EmaFile
from internvl_ds.engine.registry import engine_of, registration_of
from internvl_ds.engine.scheduling import schedule_state, warn_of_slow_schedule
from internvl_ds.errors import CheckpointError, RankError, few
from internvl_ds.files.addresses import redacted
from internvl_ds.zero.module_state import require_buffers_as_made, require_parameters_as_made
from internvl_ds.zero.wrapper import Wrapper


@dataclass
class _Save:
    """A save under way, as one rank knows it; nothing in it changes with further training.

    Attributes:
        output, tag: where it goes.
        writer: holds this rank's files.
        staging_path: where they are written.
        header: the manifest's, but for what is known at the commit only.
        policies: retention; None for a tag that is neither counted nor named by ``latest``.
        in_background: training goes on as soon as the files are copied.
        io_timeout: seconds that one rank may be slower than another.
        wanted: what the files must hold.
        own: what goes into this rank's loop_rank_*.json.
        staging, state: on rank 0 only: the lock, and what goes into state.json.
    """

    output: Path
    tag: str
    writer: ShardWriter
    staging_path: Path
    header: dict[str, Any]
    policies: list[Policy] | None
    in_background: bool
    io_timeout: float
    logger: logging.Logger
    wanted: Wanted
    own: dict[str, Any] = field(default_factory=dict)
    staging: store.Staging | None = None
    state: dict[str, Any] = field(default_factory=dict)


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
    """Saves a tag under OUTPUT. Every rank must call it: each writes its own shards.

    The tag appears under its name, and ``latest`` names it, only once all of it is on disk with a
    checksum for every file; then the epoch and step tags that no retention policy keeps go. A save
    that fails leaves all that was there. Every rank's random number generators are kept too.

    With CHECKPOINT.ASYNC it returns when the state is copied in memory, and the rest follows in the
    background. The next save, a load, `internvl_ds.shutdown` and the end of the program wait
    for it; a failure is raised there.

    Args:
        config: OUTPUT, SAVE_CKPT_NUM and CHECKPOINT are read; all of it is kept as text.
        epoch: the epoch that has ended; the tag is ``ckpt_epoch_{epoch}``. With ``step``, the
            epoch that is under way.
        model: the engine, or its module.
        max_accuracy: the best accuracy so far.
        optimizer: the engine's optimizer (its state is in the shards).
        lr_scheduler: its ``state_dict()`` is kept; may be None.
        scaler: its ``state_dict()`` is kept; may be None.
        logger: gets one line before and one after.
        model_ema: a `ShardedEma`, or timm's ModelEma, ModelEmaV2 or ModelEmaV3; kept with the tag.
        max_accuracy_ema: kept where given.
        ema_decay: kept where given.
        best: a name such as 'best' or 'ema_best': the tag is ``ckpt_epoch_{best}``, not counted
            by retention and not named by ``latest``.
        step: updates of the epoch that are done, at least 1, for a save inside it: the tag is
            ``ckpt_epoch_{epoch}_step_{step}``, of which CHECKPOINT.KEEP_STEPS stay.
        loop: an object with ``state_dict()`` and ``load_state_dict()``, such as the position in the
            epoch; each rank's own is kept. May be None.
        class_names: of the labels 0, 1, ..., such as ``ImageFolder.classes``: kept, exported, and
            compared by a `load_checkpoint` that is given those of its data.

    Returns:
        The path of the tag's directory.

    Raises:
        RankError: when a rank does not come within the limit (it is named), or when ranks come
            with different tags.
        CheckpointError: on all ranks, when any rank could not write; names rank, path, reason and
            the bytes needed. Or when the save before it, in the background, failed.
    """
    background.wait()
    engine = engine_of(model)
    registration = registration_of(engine)
    wrapper = registration.wrapper
    require_parameters_as_made(engine.module, wrapper.names)
    require_buffers_as_made(engine.module, wrapper.buffers)
    counted = best is None and isinstance(epoch, int)
    groups = None if wrapper.client is None else registration.client_groups.names
    save = _Save(
        # Absolute: the program may change its directory before a save in the background is done.
        output=Path(os.path.abspath(config.OUTPUT)),
        tag=tag_name(epoch, best, step),
        writer=install_writer(engine),
        staging_path=Path(),
        header=_header(wrapper, epoch, step if counted else None, max_accuracy),
        policies=_policies(config) if counted else None,
        in_background=bool(checkpoint_option(config, 'ASYNC')),
        io_timeout=checkpoint_option(config, 'IO_TIMEOUT'),
        logger=logger,
        wanted=wanted_of(wrapper, groups),
    )
    average = ema_file(model_ema)
    _begin(save, wrapper, average, config)
    logger.info('%s saving......', save.output / save.tag)
    untrained = wrapper.untrained_names()
    if untrained:
        logger.warning(
            '%d parameters require a gradient and no optimizer trains them, because they were '
            'frozen when the engine was made: %s. They are saved as they are. To train them, make '
            'the engine anew with an optimizer over them.',
            len(untrained),
            few(untrained),
        )
    if registration.accumulation.losses:
        logger.warning(
            'saving between two micro-batches of one update: what they have accumulated is not '
            'kept; save after a call with update_grad=True, or after optimizer.zero_grad() where '
            'the next epoch begins with it'
        )
    if counted and step is None:
        warn_of_slow_schedule(engine, config, epoch + 1, logger)

    def state() -> dict[str, Any]:
        return {
            'epoch': epoch,
            'step': step,
            'max_accuracy': float(max_accuracy),
            'max_accuracy_ema': None if max_accuracy_ema is None else float(max_accuracy_ema),
            'ema_decay': None if ema_decay is None else float(ema_decay),
            'lr_scheduler': None if lr_scheduler is None else lr_scheduler.state_dict(),
            'schedule': schedule_state(engine),
            'scaler': None if scaler is None else scaler.state_dict(),
            'loss_scale': None if wrapper.scale is None else wrapper.scale.state_dict(),
            'class_names': None if class_names is None else list(map(str, class_names)),
            'config': config,
            # As text does: whatever DeepSpeed took of plain initialize, this keeps.
            'ds_config': json.loads(json.dumps(wrapper.ds_config, default=str)),
            'optimizer_class': None if wrapper.client is None else optimizer_name(wrapper.client),
            'optimizer_groups': groups,
        }

    try:
        _stage(save, wrapper, average, state, loop)
    except BaseException:
        _abandon(save)
        raise
    finish = functools.partial(_finish, save)
    if save.in_background:
        background.start(save.tag, finish, limit=3 * save.io_timeout)
    else:
        finish()
    return str(Path(config.OUTPUT) / save.tag)


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
    rewound = not get_option(config, 'TRAIN.AUTO_RESUME', True)
    return [
        KeepNewest(count),
        KeepBest(checkpoint_option(config, 'KEEP_BEST')),
        KeepEvery(checkpoint_option(config, 'KEEP_EVERY')),
        KeepSteps(steps),
        KeepLater(max(1, count + steps) if rewound else None),
    ]


def _begin(save: _Save, wrapper: Wrapper, average: EmaFile | None, config: CfgNode) -> None:
    """Has rank 0 make the staging directory, if all ranks come with the same. A meeting of all."""
    timeout = checkpoint_option(config, 'RENDEZVOUS_TIMEOUT')
    size = save.writer.last_size
    if size is None:
        size = tensor_bytes([*wrapper.saved_tensors(rank()), average])
    own = [save.tag, save.header['epoch'], str(config.OUTPUT), save.in_background]
    calls = exchange('save_checkpoint', [own, size], timeout)
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
            save.staging = store.begin(save.output, save.tag, age=age)
        except OSError as error:
            raise CheckpointError(
                f'{save.output / save.tag}: rank 0 cannot begin to save: {error}'
            ) from error
        return save.staging.path.name

    save.staging_path = save.output / from_rank_0('begin save', make_staging, timeout)
    save.header['save'] = save.staging_path.name.rpartition('-')[2]


def _require_space(save: _Save, sizes: list[int]) -> None:
    needed, free = sum(sizes), shutil.disk_usage(save.output).free
    if needed > free:
        most = max(range(len(sizes)), key=sizes.__getitem__)
        raise CheckpointError(
            f'{save.output / save.tag}: needs {needed} bytes (rank {most} the most, '
            f'{sizes[most]}), and {free} are free: nothing was written, and the earlier '
            'checkpoints stay'
        )


def _stage(
    save: _Save,
    wrapper: Wrapper,
    average: EmaFile | None,
    state: Callable[[], dict[str, Any]],
    loop: Any,
) -> None:
    """Collects this rank's files. What fails is kept, for all ranks to hear of later."""
    writer = save.writer
    identity = Identity(save.tag, save.header['save'], rank())
    writer.begin(identity, in_background=save.in_background)
    if not save.staging_path.is_dir():
        writer.error = CheckpointError(
            f'{save.staging_path}: made by rank 0, and not there for this rank: OUTPUT must be one '
            'directory that all hosts share'
        )
    # Meets in barriers: every rank calls it, whatever has happened.
    with (
        wrapper.saving(writer.defer),
        # What is on NVMe is copied to the tag between barriers.
        collectives_within(save.io_timeout if wrapper.kept_on_nvme() else 0),
    ):
        wrapper.engine.save_checkpoint(
            str(save.output), tag=save.staging_path.name, save_latest=False
        )
    if average is not None:
        writer.save(average, save.staging_path / average.name)
    try:
        own = None if loop is None else loop.state_dict()
        said = {Identity.KEY: identity.to_dict()}
        save.own = copy.deepcopy({'rng': rng_state(), 'loop': own, **said})
        if rank() == 0:
            save.state = copy.deepcopy({**state(), **said})
    except Exception as error:
        writer.error = writer.error or error


def _finish(save: _Save) -> None:
    """Writes what is not written yet, reports, commits. A meeting of all ranks, on any thread."""

    def commit_or_abandon() -> None:
        try:
            _commit(save, reports)
        except Exception:
            _abandon(save)  # before the others hear of it
            raise

    try:
        report = _write_own_files(save)
        reports = gather('write checkpoint', report, save.io_timeout)
        from_rank_0('commit', commit_or_abandon, save.io_timeout)
    except Exception as error:
        _abandon(save)
        if save.writer.error is not None:
            raise error from save.writer.error
        raise
    save.writer.last_size = sum(entry.size for entry in save.writer.written.values())
    save.logger.info('%s saved !!!', save.output / save.tag)


def _abandon(save: _Save) -> None:
    save.writer.forget()
    if save.staging is not None:
        store.abandon(save.staging)


def _write_own_files(save: _Save) -> dict[str, Any]:
    writer = save.writer
    writer.finish()
    try:
        if writer.error is None:
            _write_text(save, LOOP_FILE.format(rank()), state_text(save.own))
        if rank() == 0 and writer.error is None:
            # Here, because the YAML of a configuration takes longer than much of a copy.
            text = state_text({**save.state, 'config': redacted(save.state['config'].dump())})
            _write_text(save, STATE_FILE, text)
        if writer.error is None:
            prove(save.staging_path, _named(save), save.wanted)
    except (OSError, CheckpointError) as error:
        writer.error = error
    except Exception as error:  # the others wait for the report
        writer.error = CheckpointError(f'{save.staging_path}: cannot be read again: {error!r}')
    if writer.error is not None:
        return {'error': str(writer.error)}
    return {'files': {name: list(entry) for name, entry in _named(save).items()}}


def _named(save: _Save) -> dict[str, FileEntry]:
    """The files that this rank wrote, by their names in the tag."""
    written = save.writer.written
    return {str(path.relative_to(save.staging_path)): entry for path, entry in written.items()}


def _write_text(save: _Save, name: str, text: str) -> None:
    path = save.staging_path / name
    save.writer.written[path] = write_hashed(path, lambda file: file.write(text.encode()))


def _commit(save: _Save, reports: list[dict[str, Any]] | None) -> None:
    assert save.staging is not None  # this is rank 0
    assert reports is not None
    failed = {r: report['error'] for r, report in enumerate(reports) if 'error' in report}
    errors = [f'rank {r}: {text}' for r, text in failed.items()]
    if failed:
        raise CheckpointError(
            f'{save.output / save.tag}: not saved, and the earlier checkpoints stay: '
            f'{"; ".join(errors)}'
        )
    files = {n: FileEntry(*e) for report in reports for n, e in report['files'].items()}
    try:
        sizes = file_sizes(save.staging_path)
        store.require_files(save.staging, files, sizes)
        for name in sizes.keys() - files.keys() - {MARK}:  # what DeepSpeed wrote by itself
            files[name] = flush_and_hash(save.staging_path / name)
        header = Header(
            tag=save.tag,
            sequence=store.next_sequence(save.output),
            saved_at=datetime.now(timezone.utc).isoformat(timespec='seconds'),
            size=sum(entry.size for entry in files.values()),
            **save.header,
        )
        manifest = Manifest(header, dict(sorted(files.items())))
        store.commit(save.staging, manifest, latest=save.policies is not None)
    except OSError as error:
        raise CheckpointError(
            f'{save.output / save.tag}: not saved, and the earlier checkpoints stay: rank 0 cannot '
            f'commit it: {error}'
        ) from error
    note_save(save.output, save.tag, header.save)
    if save.policies is not None:
        try:
            store.prune(save.output, save.policies)
        except OSError as error:
            save.logger.warning('%s: old tags stay for now: %s', save.output, error)
