"""load_checkpoint, load_ema_checkpoint and auto_resume_helper. All ranks call them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from yacs.config import CfgNode

from internvl_ds.checkpoint import background, lookup, store
from internvl_ds.checkpoint.averages import (
    ema_fits_directly,
    holds_ema,
    load_other_ema,
    load_whole_ema,
    read_whole_ema,
)
from internvl_ds.checkpoint.layout import layout_of_engine, layout_of_tag, same_groups
from internvl_ds.checkpoint.loop_state import restore_loop
from internvl_ds.checkpoint.manifest import LOOP_FILE, STATE_FILE, Manifest, file_rank
from internvl_ds.checkpoint.original import weights_of_file
from internvl_ds.checkpoint.restore import load_weights, model_shapes, require_same_model
from internvl_ds.checkpoint.resume import (
    load_other_layout,
    load_same_layout,
    open_file,
    train_from_file,
)
from internvl_ds.checkpoint.schedule import restore_schedule
from internvl_ds.checkpoint.shards import TagShards
from internvl_ds.checkpoint.state import state_of
from internvl_ds.checkpoint.verify import damage, share_of
from internvl_ds.config import checkpoint_option, default_config, get_option
from internvl_ds.ema import ShardedEma, has_ema
from internvl_ds.engine import engine_of, find_engine, restore_loss_scale
from internvl_ds.errors import (
    CheckpointError,
    CheckpointNotFound,
)
from internvl_ds.meetings import agree, exchange, from_rank_0, rank, world_size
from internvl_ds.scheduling import restore_schedule_position

_log = logging.getLogger(__name__)


def load_checkpoint(
    config: CfgNode,
    model: Any,
    optimizer: Any,
    lr_scheduler: Any,
    scaler: Any,
    logger: logging.Logger,
    *,
    loop: Any = None,
) -> float:
    """Loads MODEL.RESUME. Every rank must call it.

    What is read is verified against the manifest's checksums first; a tag of plain DeepSpeed, which
    has none, is loaded with a warning.

    Unless EVAL_MODE: weights, optimizer, scheduler and scaler are restored, and TRAIN.START_EPOCH
    is set to the saved epoch + 1, or for a tag saved inside an epoch to that epoch. On as many
    ranks as before, every rank's random number generators are restored too. A tag of the same
    layout (world size, ZeRO stage, precision and parameter groups) is loaded by DeepSpeed; any
    other, and an original's .pth, by the parameters' names, each rank reading its own part. In
    EVAL_MODE only weights are loaded, into an engine or a plain nn.Module.

    Args:
        config: MODEL.RESUME is a tag directory, an output directory (its newest undamaged tag is
            taken), an original's .pth file, or the https URL of one.
        model: the engine or its module; in EVAL_MODE also a plain module.
        optimizer: the engine's optimizer; not used in EVAL_MODE.
        lr_scheduler: restored through ``load_state_dict``; may be None.
        scaler: restored through ``load_state_dict``; may be None.
        logger: told what was loaded.
        loop: what `save_checkpoint` was given: its ``load_state_dict`` gets what this rank's
            ``state_dict`` said (rank 0's, on other ranks than before). Not called for a checkpoint
            without one.

    Returns:
        The saved max_accuracy; 0.0 when the checkpoint has none.

    Raises:
        CheckpointNotFound: when nothing is at the path.
        CheckpointMismatch: when it is of another model, of other trained parameters or another
            optimizer; before any state is changed.
        CheckpointError: when it cannot be read, or a file of it is not what was written; before
            any state is changed.
    """
    background.wait()
    resume, timeout = config.MODEL.RESUME, checkpoint_option(config, 'RENDEZVOUS_TIMEOUT')
    io_timeout = checkpoint_option(config, 'IO_TIMEOUT')
    logger.info('==============> Resuming from %s....................', resume)
    path = _resolve(resume, logger, timeout, io_timeout)
    eval_mode = get_option(config, 'EVAL_MODE', False)
    if path is None or path.is_file():
        where = str(path or resume)
        if eval_mode:
            return _evaluate_file(where, model, logger)
        return train_from_file(config, where, model, lr_scheduler, scaler, logger)
    if eval_mode:
        _verify(path, _share_of_weights, io_timeout, logger)
        state = agree('read state', lambda: state_of(path), timeout, CheckpointError)
        weights = agree(
            'read weights', lambda: TagShards(path).weights(), io_timeout, CheckpointError
        )
        load_weights(find_engine(model) or model, weights, str(path))
    else:
        engine = engine_of(model)
        direct = _fits_directly(engine, path, timeout, io_timeout, logger)
        shards = agree('find shards', lambda: TagShards(path), timeout, CheckpointError)
        state = agree('read state', lambda: state_of(path), timeout, CheckpointError)
        if direct:
            state = {**load_same_layout(engine, shards, io_timeout, logger), **state}
            restore_loss_scale(engine, state.get('loss_scale'))
            restore_schedule(config, state, lr_scheduler, scaler, path, logger)
            restore_schedule_position(engine, state.get('schedule'), lr_scheduler is not None)
        else:
            load_other_layout(
                config, engine, shards, state, lr_scheduler, scaler, io_timeout, logger
            )
        restore_loop(path, state, shards.world_size, loop, timeout, logger)
    logger.info('=> loaded successfully %s (epoch %s)', path, state.get('epoch', 'unknown'))
    return float(state.get('max_accuracy') or 0.0)


def load_ema_checkpoint(config: CfgNode, model_ema: Any, logger: logging.Logger) -> float:
    """Loads the averaged weights of MODEL.RESUME. Every rank must call it.

    Args:
        config: MODEL.RESUME as in `load_checkpoint`.
        model_ema: a `ShardedEma`, or timm's ModelEma, ModelEmaV2 or ModelEmaV3; saved by any kind
            and layout. Its ``decay`` is set where the checkpoint has one.
        logger: warned when the checkpoint has no EMA; the average is then left as it is.

    Returns:
        The saved max_accuracy_ema; 0.0 when the checkpoint has none.

    Raises:
        CheckpointNotFound, CheckpointMismatch, CheckpointError: as `load_checkpoint`.
    """
    background.wait()
    resume, timeout = config.MODEL.RESUME, checkpoint_option(config, 'RENDEZVOUS_TIMEOUT')
    io_timeout = checkpoint_option(config, 'IO_TIMEOUT')
    path = _resolve(resume, logger, timeout, io_timeout)
    if path is None or path.is_file():
        checkpoint = open_file(str(path or resume))
        weights = checkpoint.get('model_ema')
        state: dict[str, Any] = {
            key: checkpoint.get(key) for key in ('max_accuracy_ema', 'ema_decay')
        }
        if weights is not None:
            load_whole_ema(model_ema, weights, resume)
    else:
        weights = None
        if holds_ema(path):
            weights = {}
            _load_ema_of_tag(model_ema, path, timeout, io_timeout, logger)
        state = agree('read state', lambda: state_of(path), timeout, CheckpointError)
    if weights is None:
        logger.warning('%s has no EMA: starting from the loaded weights', resume)
    else:
        logger.info('loaded the EMA of %s', resume)
    if state.get('ema_decay') is not None:
        model_ema.decay = state['ema_decay']
    return float(state.get('max_accuracy_ema') or 0.0)


def _load_ema_of_tag(
    model_ema: Any, path: Path, timeout: float, io_timeout: float, logger: logging.Logger
) -> None:
    """Reads what this rank needs of it. A meeting of all ranks."""
    sharded = isinstance(model_ema, ShardedEma)

    def fits() -> bool:
        return sharded and has_ema(path) and ema_fits_directly(model_ema, path)

    if from_rank_0('compare EMA', fits, timeout):
        _verify(path, _own_ema, io_timeout, logger)
        agree('read EMA', lambda: model_ema.load_shard(path), io_timeout, CheckpointError)
        return
    _verify(path, _share_of_ema, io_timeout, logger)
    if sharded:
        agree('read EMA', lambda: load_other_ema(model_ema, path), io_timeout, CheckpointError)
        return
    weights = agree('read EMA', lambda: read_whole_ema(path), io_timeout, CheckpointError)
    load_whole_ema(model_ema, weights, str(path))


def auto_resume_helper(output_dir: str) -> str | None:
    """The newest checkpoint in a directory, for MODEL.RESUME; the same answer on every rank.

    Every rank must call it once there is a process group. The tag's checksums are verified, each
    rank reading a share of its files; a damaged tag is passed over with a warning that names file
    and reason. What dead saves left in the directory is swept away.

    Returns:
        A tag's path; None when there is no such directory, or no checkpoint was ever in it.

    Raises:
        CheckpointNotFound: when checkpoints were there and no whole one is left.
    """
    background.wait()
    limits = default_config().CHECKPOINT
    from_rank_0('sweep', lambda: _sweep(Path(output_dir)), limits.RENDEZVOUS_TIMEOUT)
    found = _newest(Path(output_dir), limits.RENDEZVOUS_TIMEOUT, limits.IO_TIMEOUT)
    if found is None:
        return None
    if found.warning and rank() == 0:
        _log.warning(found.warning)
    return str(found.path)


def _sweep(output: Path) -> None:
    try:
        store.sweep(output)
    except OSError as error:  # someone who may only read: it stays as it is
        _log.info('%s: leftovers of dead saves are not swept: %s', output, error)


def _newest(output: Path, timeout: float, io_timeout: float) -> lookup.Resume | None:
    """The newest tag whose checksums are right, on all ranks alike. A meeting of all ranks."""
    damaged: dict[str, str] = {}

    def find() -> list[str | None] | None:
        found = lookup.newest(output, damaged)
        return None if found is None else [str(found.path), found.warning]

    while True:
        answer = from_rank_0('find newest', find, timeout)
        if answer is None:
            return None
        path, warning = Path(answer[0]), answer[1]
        reports = exchange('verify newest', _damage_of_share(path), io_timeout)
        reasons = [reason for report in reports for reason in report]
        if not reasons:
            return lookup.Resume(path, warning)
        damaged[path.name] = '; '.join(reasons[:3])


def _damage_of_share(path: Path) -> list[str]:
    if path.is_file():
        return []
    try:
        manifest = lookup.read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    if manifest is None:
        return []
    return damage(path, manifest, share_of(manifest.files, rank(), world_size()))


def _resolve(resume: str, logger: logging.Logger, timeout: float, io_timeout: float) -> Path | None:
    """The tag or file that MODEL.RESUME names, the same on all ranks; None for a URL."""
    if not resume:
        raise CheckpointNotFound('MODEL.RESUME is empty: set it to a checkpoint')
    if resume.startswith('https://'):
        return None
    path, is_tag = from_rank_0('resolve resume', lambda: _named(resume), timeout)
    if is_tag:
        return Path(path)
    found = _newest(Path(path), timeout, io_timeout)
    if found is None:
        raise CheckpointNotFound(f'{path}: a directory without any checkpoint')
    if found.warning:
        logger.warning(found.warning)
    return found.path


def _named(resume: str) -> tuple[str, bool]:
    path = lookup.resolve(resume)
    return str(path), path.is_file() or lookup.is_tag(path)


def _verify(
    path: Path, choose: Callable[[Manifest], list[str]], timeout: float, logger: logging.Logger
) -> None:
    """Compares files with their checksums, on this rank those that ``choose`` names.

    A meeting of all ranks.

    Raises:
        CheckpointError: on all ranks, when a file of any rank is damaged.
    """

    def check() -> bool:
        manifest = lookup.read_manifest(path)
        if manifest is None:
            return False
        found = damage(path, manifest, choose(manifest))
        if found:
            raise CheckpointError('; '.join(found))
        return True

    if not agree('verify', check, timeout, CheckpointError):
        logger.warning('%s has no manifest: it could not be verified', path)


def _own_shards(manifest: Manifest) -> list[str]:
    """What DeepSpeed and `restore_loop` read on this rank, and state.json."""
    loop = LOOP_FILE.format(rank())
    own = [loop] if loop in manifest.files else []
    shards = [n for n in manifest.files if n.endswith('_states.pt')]
    return [STATE_FILE, *own, *(n for n in shards if 'pp_rank' not in n or file_rank(n) == rank())]


def _own_ema(manifest: Manifest) -> list[str]:
    """What a sharded average reads on this rank, and state.json."""
    files = [n for n in manifest.files if n.startswith('ema_rank_')]
    return [STATE_FILE, *(n for n in files if file_rank(n) in (0, rank()))]


def _share_of_shards(manifest: Manifest) -> list[str]:
    """Of all that any rank may read, the part that this one verifies for all."""
    loops = [LOOP_FILE.format(r) for r in range(manifest.header.world_size)]
    read = {STATE_FILE, *loops}
    names = [n for n in manifest.files if n.endswith('_states.pt') or n in read]
    return share_of(names, rank(), world_size())


def _share_of_weights(manifest: Manifest) -> list[str]:
    """Of what `TagShards.weights` reads on every rank, the part that this one verifies for all."""
    ending = '_states.pt' if manifest.header.zero_stage == 3 else '_model_states.pt'
    names = [STATE_FILE, *(n for n in manifest.files if n.endswith(ending))]
    return share_of(names, rank(), world_size())


def _share_of_ema(manifest: Manifest) -> list[str]:
    """Of what `read_whole_ema` reads on every rank, the part that this one verifies for all."""
    return share_of(manifest.files, rank(), world_size())


def _evaluate_file(resume: str, model: Any, logger: logging.Logger) -> float:
    checkpoint = open_file(resume)
    weights = weights_of_file(checkpoint, resume)
    load_weights(find_engine(model) or model, weights, resume)
    logger.info('=> loaded the weights of %s', resume)
    return float(checkpoint.get('max_accuracy') or 0.0)


def _fits_directly(
    engine: DeepSpeedEngine, path: Path, timeout: float, io_timeout: float, logger: logging.Logger
) -> bool:
    """Whether DeepSpeed can load a tag by itself. Verifies what will be read, either way."""

    def same_layout() -> bool:
        return layout_of_tag(path) == layout_of_engine(engine)

    def groups_fit() -> bool:
        shards = TagShards(path)
        require_same_model(shards.shapes(), model_shapes(engine.module), str(path))
        return same_groups(engine, shards)

    if from_rank_0('compare layouts', same_layout, timeout):
        _verify(path, _own_shards, io_timeout, logger)
        if from_rank_0('compare groups', groups_fit, timeout):
            return True
    _verify(path, _share_of_shards, io_timeout, logger)
    return False
