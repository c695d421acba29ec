"""The checkpoint names of the API: save, load, load the EMA, auto resume. All ranks call them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from yacs.config import CfgNode

import internvl_ds
from internvl_ds.checkpoint import store
from internvl_ds.checkpoint.averages import holds_ema, load_whole_ema, read_whole_ema, save_ema
from internvl_ds.checkpoint.layout import precision_of, require_same_layout
from internvl_ds.checkpoint.manifest import STATE_FILE, Manifest, tag_name
from internvl_ds.checkpoint.restore import load_weights
from internvl_ds.checkpoint.shards import TagShards, read_shard
from internvl_ds.checkpoint.state import read_state, write_state
from internvl_ds.checkpoint.writer import install_writer
from internvl_ds.comm import agree, exchange, from_rank_0, rank, world_size
from internvl_ds.config import default_config, get_option
from internvl_ds.ema import ShardedEma, has_ema
from internvl_ds.engine import engine_of, find_engine
from internvl_ds.errors import (
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    PretrainedError,
    RankError,
)
from internvl_ds.pretrained.sources import open_source

_log = logging.getLogger(__name__)


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
) -> str:
    """Saves a tag under OUTPUT. Every rank must call it: each writes its own shards.

    The tag appears under its name, and ``latest`` names it, only once all of it is on disk; then
    the epoch tags beyond the newest SAVE_CKPT_NUM go. A save that fails leaves all that was there.

    Args:
        config: OUTPUT, SAVE_CKPT_NUM and CHECKPOINT.RENDEZVOUS_TIMEOUT are read; kept as text.
        epoch: the epoch that has ended; the tag is ``ckpt_epoch_{epoch}``.
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

    Returns:
        The path of the tag's directory.

    Raises:
        RankError: when a rank does not come within the limit (it is named), or when ranks come
            with different tags.
        CheckpointError: on all ranks, when any rank could not write; names rank and reason.
    """
    engine = engine_of(model)
    tag, output = tag_name(epoch, best), Path(config.OUTPUT)
    timeout, io_timeout = _timeout(config), _timeout(config, 'IO_TIMEOUT')
    calls = exchange('save_checkpoint', [tag, str(output)], timeout)
    if any(call != calls[0] for call in calls):
        raise RankError(f'save_checkpoint: the ranks came with different tags or outputs: {calls}')
    logger.info('%s saving......', output / tag)
    if engine._is_gradient_accumulation_boundary is False:
        logger.warning(
            'saving between two micro-batches of one update: what they have accumulated is not '
            'kept; save after a call with update_grad=True'
        )
    from_rank_0('begin save', lambda: str(store.begin(output, tag)), timeout)
    staging = store.staging_path(output, tag)
    state = {
        'epoch': epoch,
        'max_accuracy': float(max_accuracy),
        'max_accuracy_ema': None if max_accuracy_ema is None else float(max_accuracy_ema),
        'ema_decay': None if ema_decay is None else float(ema_decay),
        'lr_scheduler': None if lr_scheduler is None else lr_scheduler.state_dict(),
        'scaler': None if scaler is None else scaler.state_dict(),
        'config': config.dump(),
    }
    try:
        writer = install_writer(engine)
        # Stays on this side of the barriers inside: a failed write is kept, and raised below.
        engine.save_checkpoint(str(output), tag=staging.name, save_latest=False)

        def write_own_files() -> None:
            if writer.error is not None:
                raise CheckpointError(f'{staging}: {writer.error}') from writer.error
            if rank() == 0:
                write_state(staging / STATE_FILE, state)
            save_ema(model_ema, staging)

        agree('write checkpoint', write_own_files, io_timeout, CheckpointError)
        from_rank_0('commit', lambda: _commit(config, engine, epoch, tag, best), io_timeout)
    except Exception:
        if rank() == 0:
            store.abandon(output, tag)
        raise
    logger.info('%s saved !!!', output / tag)
    return str(output / tag)


def load_checkpoint(
    config: CfgNode,
    model: Any,
    optimizer: Any,
    lr_scheduler: Any,
    scaler: Any,
    logger: logging.Logger,
) -> float:
    """Loads MODEL.RESUME. Every rank must call it.

    Unless EVAL_MODE: weights, optimizer, scheduler and scaler are restored, and TRAIN.START_EPOCH
    is set to the saved epoch + 1. In EVAL_MODE only weights are loaded, of any stage and world
    size, or from an original .pth, into an engine or a plain nn.Module.

    Args:
        config: MODEL.RESUME is a tag directory, an output directory (its newest tag is taken), or
            in EVAL_MODE also a .pth file or an https URL.
        model: the engine or its module; in EVAL_MODE also a plain module.
        optimizer: the engine's optimizer; not used in EVAL_MODE.
        lr_scheduler: restored through ``load_state_dict``; may be None.
        scaler: restored through ``load_state_dict``; may be None.
        logger: told what was loaded.

    Returns:
        The saved max_accuracy; 0.0 when the checkpoint has none.

    Raises:
        CheckpointNotFound: when nothing is at the path.
        CheckpointMismatch: when it is of another model, layout or precision; before any state is
            changed.
        CheckpointError: when it cannot be read.
    """
    resume, timeout = config.MODEL.RESUME, _timeout(config)
    io_timeout = _timeout(config, 'IO_TIMEOUT')
    logger.info('==============> Resuming from %s....................', resume)
    path = _resolve(resume, logger, timeout)
    eval_mode = get_option(config, 'EVAL_MODE', False)
    if path is None or path.is_file():
        return _load_file(config, resume, model, logger)
    state = agree('read state', lambda: _state_of(path), timeout, CheckpointError)
    if eval_mode:
        weights = agree(
            'read weights', lambda: TagShards(path).weights(), io_timeout, CheckpointError
        )
        load_weights(find_engine(model) or model, weights, str(path))
    else:
        client_state = _load_training_state(engine_of(model), path, timeout, io_timeout, logger)
        state = {**client_state, **state}
        _restore_schedule(config, state, lr_scheduler, scaler, path, logger)
    logger.info('=> loaded successfully %s (epoch %s)', path, state.get('epoch', 'unknown'))
    return float(state.get('max_accuracy') or 0.0)


def load_ema_checkpoint(config: CfgNode, model_ema: Any, logger: logging.Logger) -> float:
    """Loads the averaged weights of MODEL.RESUME. Every rank must call it.

    Args:
        config: MODEL.RESUME as in `load_checkpoint`.
        model_ema: a `ShardedEma` (same world size and stage as saved), or timm's ModelEma,
            ModelEmaV2 or ModelEmaV3 (any). Its ``decay`` is set where the checkpoint has one.
        logger: warned when the checkpoint has no EMA; the average is then left as it is.

    Returns:
        The saved max_accuracy_ema; 0.0 when the checkpoint has none.

    Raises:
        CheckpointNotFound, CheckpointMismatch, CheckpointError: as `load_checkpoint`.
    """
    resume, timeout = config.MODEL.RESUME, _timeout(config)
    io_timeout = _timeout(config, 'IO_TIMEOUT')
    path = _resolve(resume, logger, timeout)
    if path is None or path.is_file():
        checkpoint = open_source(resume)
        weights = checkpoint.get('model_ema')
        state: dict[str, Any] = {
            key: checkpoint.get(key) for key in ('max_accuracy_ema', 'ema_decay')
        }
        if weights is not None:
            load_whole_ema(model_ema, weights, resume)
    else:
        state = agree('read state', lambda: _state_of(path), timeout, CheckpointError)
        weights = None
        if isinstance(model_ema, ShardedEma) and has_ema(path):
            agree('read EMA', lambda: model_ema.load_shard(path), io_timeout, CheckpointError)
            weights = {}
        elif holds_ema(path):
            weights = agree('read EMA', lambda: read_whole_ema(path), io_timeout, CheckpointError)
            load_whole_ema(model_ema, weights, str(path))
    if weights is None:
        logger.warning('%s has no EMA: starting from the loaded weights', resume)
    else:
        logger.info('loaded the EMA of %s', resume)
    if state.get('ema_decay') is not None:
        model_ema.decay = state['ema_decay']
    return float(state.get('max_accuracy_ema') or 0.0)


def auto_resume_helper(output_dir: str) -> str | None:
    """The newest checkpoint in a directory, for MODEL.RESUME; the same answer on every rank.

    Every rank must call it once there is a process group.

    Returns:
        A tag's path; None when there is no such directory, or no checkpoint was ever in it.

    Raises:
        CheckpointNotFound: when checkpoints were there and no whole one is left.
    """

    def find() -> tuple[str, str | None] | None:
        found = store.newest(Path(output_dir))
        return None if found is None else (str(found.path), found.warning)

    found = from_rank_0('auto resume', find, default_config().CHECKPOINT.RENDEZVOUS_TIMEOUT)
    if found is None:
        return None
    path, warning = found
    if warning and rank() == 0:
        _log.warning(warning)
    return path


def _timeout(config: CfgNode, key: str = 'RENDEZVOUS_TIMEOUT') -> float:
    default = default_config().CHECKPOINT[key]
    return float(get_option(config, f'CHECKPOINT.{key}', default))


def _commit(config: CfgNode, engine: DeepSpeedEngine, epoch: Any, tag: str, best: Any) -> None:
    output = Path(config.OUTPUT)
    store.commit(
        output,
        Manifest(
            tag=tag,
            epoch=epoch if isinstance(epoch, int) else None,
            sequence=store.next_sequence(output),
            zero_stage=engine.zero_optimization_stage(),
            world_size=world_size(),
            precision=precision_of(engine.config),
            global_steps=engine.global_steps,
            files=store.file_sizes(store.staging_path(output, tag)),
            versions={
                'internvl_ds': internvl_ds.__version__,
                'torch': str(torch.__version__),
                'deepspeed': deepspeed.__version__,
            },
        ),
    )
    if best is None and isinstance(epoch, int):
        store.write_latest(output, tag)
        store.prune(output, get_option(config, 'SAVE_CKPT_NUM', default_config().SAVE_CKPT_NUM))


def _resolve(resume: str, logger: logging.Logger, timeout: float) -> Path | None:
    """The tag or file that MODEL.RESUME names, found by rank 0 for all; None for a URL."""
    if not resume:
        raise CheckpointNotFound('MODEL.RESUME is empty: set it to a checkpoint')
    if resume.startswith('https://'):
        return None

    def find() -> tuple[str, str | None]:
        found = store.resolve(resume)
        return str(found.path), found.warning

    path, warning = from_rank_0('resolve resume', find, timeout)
    if warning:
        logger.warning(warning)
    return Path(path)


def _state_of(path: Path) -> dict[str, Any]:
    """What state.json keeps; empty for a tag of plain DeepSpeed."""
    state = path / STATE_FILE
    return read_state(state) if state.is_file() else {}


def _load_file(config: CfgNode, resume: str, model: Any, logger: logging.Logger) -> float:
    if not get_option(config, 'EVAL_MODE', False):
        raise CheckpointError(
            f'{resume}: this version resumes training from tag directories only. Evaluate a .pth '
            'with EVAL_MODE, or start from its weights with MODEL.PRETRAINED.'
        )
    try:
        checkpoint = open_source(resume)
    except PretrainedError as error:
        raise CheckpointError(str(error)) from error
    found = (checkpoint.get(key) for key in ('model', 'module', 'state_dict'))
    weights = next((value for value in found if isinstance(value, Mapping)), checkpoint)
    odd = next((key for key, value in weights.items() if not isinstance(value, torch.Tensor)), None)
    if odd is not None:
        raise CheckpointMismatch(
            f'{resume}: {odd!r} is a {type(weights[odd]).__name__}, not a tensor: no state dict is '
            "under 'model', 'module' or 'state_dict', nor is the file one"
        )
    load_weights(find_engine(model) or model, weights, resume)
    logger.info('=> loaded the weights of %s', resume)
    return float(checkpoint.get('max_accuracy') or 0.0)


def _load_training_state(
    engine: DeepSpeedEngine,
    path: Path,
    timeout: float,
    io_timeout: float,
    logger: logging.Logger,
) -> dict[str, Any]:
    from_rank_0('check layout', lambda: require_same_layout(engine, path), timeout)

    def read_own_files() -> None:
        # Before any rank changes state or enters a collective: can this rank read its shards?
        shards = TagShards(path)
        for files in (shards.model_files, shards.optim_files):
            if files:
                read_shard(files[min(rank(), len(files) - 1)], mmap=True)

    agree('read shards', read_own_files, io_timeout, CheckpointError)
    install_writer(engine)

    def load() -> dict[str, Any]:
        loaded, client_state = engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise CheckpointError(f'{path}: DeepSpeed found nothing to load in it')
        return client_state

    running = _hyperparameters(engine)
    client_state = agree('load shards', load, io_timeout, CheckpointError)
    # Those of the running configuration hold; the lr is the scheduler's.
    for group, own, saved in zip(
        engine.optimizer.param_groups, running, _hyperparameters(engine), strict=True
    ):
        group.update(own)
        changed = {key: (saved.get(key), own[key]) for key in own if saved.get(key) != own[key]}
        if changed:
            logger.warning('%s: (saved, now) of the optimizer differ, now holds: %s', path, changed)
    return client_state


def _hyperparameters(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    """Each group's own settings, such as weight_decay and betas, without its lr."""
    keys = engine.basic_optimizer.defaults.keys() - {'lr'}
    return [{k: group[k] for k in keys if k in group} for group in engine.optimizer.param_groups]


def _restore_schedule(
    config: CfgNode,
    state: dict[str, Any],
    lr_scheduler: Any,
    scaler: Any,
    path: Path,
    logger: logging.Logger,
) -> None:
    if state.get('lr_scheduler') is not None and lr_scheduler is not None:
        _warn_of_another_schedule(lr_scheduler, state['lr_scheduler'], path, logger)
        lr_scheduler.load_state_dict(state['lr_scheduler'])
    elif lr_scheduler is not None:
        logger.warning('%s has no state of the lr scheduler: it goes on by itself', path)
    if state.get('scaler') is not None and scaler is not None:
        scaler.load_state_dict(state['scaler'])
    if isinstance(state.get('epoch'), int):
        frozen = config.is_frozen()
        config.defrost()
        config.TRAIN.START_EPOCH = state['epoch'] + 1
        if frozen:
            config.freeze()
    else:
        logger.warning(
            '%s does not say its epoch: TRAIN.START_EPOCH stays %s', path, config.TRAIN.START_EPOCH
        )


def _warn_of_another_schedule(
    lr_scheduler: Any, saved: Mapping[str, Any], path: Path, logger: logging.Logger
) -> None:
    """A schedule is restored as it was saved, as the original does; say so where it differs."""
    built = lr_scheduler.state_dict()
    # torch's schedulers keep their position with their settings; timm's keep none.
    position = {'last_epoch', '_step_count', '_last_lr', '_get_lr_called_within_step', 'metric'}
    differing = {
        key: (saved[key], built[key])
        for key in saved.keys() & built.keys() - position
        if saved[key] != built[key]
    }
    if differing:
        logger.warning(
            '%s: the lr schedule goes on as it was saved; (saved, configured now) differ in %s',
            path,
            differing,
        )
