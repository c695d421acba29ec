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
    count_on,
    ema_fits_directly,
    load_other_ema,
    load_whole_ema,
    read_whole_ema,
)
from internvl_ds.checkpoint.client_state import saved_state, unread_keys
from internvl_ds.checkpoint.ema_files import EmaFiles
from internvl_ds.checkpoint.layout import layout_of_engine, layout_of_tag, same_groups
from internvl_ds.checkpoint.loop_state import read_loop, restore_loop
from internvl_ds.checkpoint.manifest import LOOP_FILE, STATE_FILE, Manifest, file_rank
from internvl_ds.checkpoint.original import weights_of_file
from internvl_ds.checkpoint.restore import load_weights, model_shapes, require_same_model
from internvl_ds.checkpoint.resume import (
    load_other_layout,
    load_same_layout,
    open_file,
    train_from_file,
)
from internvl_ds.checkpoint.schedule import (
    restore_engines_own,
    restore_schedule,
    set_lr_of_schedule,
)
from internvl_ds.checkpoint.shards import TagShards
from internvl_ds.checkpoint.verify import damage, share_of
from internvl_ds.config import checkpoint_option, default_config, get_option
from internvl_ds.ema import ShardedEma
from internvl_ds.engine import engine_of, find_engine, restore_loss_scale
from internvl_ds.errors import CheckpointError, CheckpointNotFound, few
from internvl_ds.meetings import agree, exchange, from_rank_0, rank, world_size

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
        accuracy = train_from_file(config, where, model, lr_scheduler, scaler, logger)
        restore_engines_own(engine_of(model), lr_scheduler, None, where, logger)
        return accuracy
    if eval_mode:
        _verify(path, _share_of_weights, io_timeout)
        shards = agree('find shards', lambda: _shards_of(path, logger), timeout, CheckpointError)
        state = agree('read state', lambda: saved_state(shards), timeout, CheckpointError)
        weights = agree('read weights', shards.weights, io_timeout, CheckpointError)
        load_weights(find_engine(model) or model, weights, str(path))
    else:
        engine = engine_of(model)
        direct = _fits_directly(engine, path, timeout, io_timeout)
        shards = agree('find shards', lambda: _shards_of(path, logger), timeout, CheckpointError)
        agree('read loop', lambda: read_loop(path, shards.world_size), timeout, CheckpointError)
        state = agree('read state', lambda: saved_state(shards), timeout, CheckpointError)
        if lr_scheduler is None and engine.lr_scheduler is not None and not shards.has_manifest:
            state['lr_scheduler'] = None  # it is restored with the engine
        if direct:
            load_same_layout(engine, shards, io_timeout, logger)
            restore_loss_scale(engine, state.get('loss_scale'))
            restored = restore_schedule(config, state, lr_scheduler, scaler, path, logger)
            if not restored or not shards.has_manifest:  # else the lr is in the shards
                groups = engine.basic_optimizer.param_groups
                set_lr_of_schedule(lr_scheduler, groups, shards.updates)
        else:
            load_other_layout(
                config, engine, shards, state, lr_scheduler, scaler, io_timeout, logger
            )
            saved = shards.head.get('lr_scheduler')
            restore_engines_own(engine, lr_scheduler, saved, path, logger)
        restore_loop(path, state, shards.world_size, loop, timeout, logger)
        if get_option(config, 'TRAIN.EMA.ENABLE', None) is False and EmaFiles(path):
            logger.info(
                '%s holds an EMA: load_ema_checkpoint goes on with it, and TRAIN.EMA.ENABLE True '
                'in the training program; otherwise the next tags have none',
                path,
            )
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
    path, configured = _resolve(resume, logger, timeout, io_timeout), model_ema.decay
    if path is None or path.is_file():
        checkpoint = open_file(str(path or resume))
        weights = checkpoint.get('model_ema')
        state: dict[str, Any] = {
            key: checkpoint.get(key) for key in ('max_accuracy_ema', 'ema_decay')
        }
        if weights is not None:
            load_whole_ema(model_ema, weights, resume)
            count_on(model_ema, None, resume, logger)
    else:
        weights = None
        saved = agree('find EMA', lambda: EmaFiles(path), timeout, CheckpointError)
        if saved:
            weights = {}
            _load_ema_of_tag(model_ema, saved, timeout, io_timeout)
        shards = agree('find shards', lambda: TagShards(path), timeout, CheckpointError)
        state = agree('read state', lambda: saved_state(shards), timeout, CheckpointError)
        _warn_unverified(shards, logger)
        if saved and not saved.sharded:
            count_on(model_ema, shards.updates, resume, logger)
    if weights is None:
        logger.warning('%s has no EMA: starting from the loaded weights', resume)
    else:
        logger.info('loaded the EMA of %s', resume)
    if state.get('ema_decay') is not None:
        model_ema.decay = state['ema_decay']
    if model_ema.decay != configured:
        logger.warning(
            '%s: its EMA goes on with its decay of %s; %s is configured now',
            resume,
            model_ema.decay,
            configured,
        )
    return float(state.get('max_accuracy_ema') or 0.0)


def _load_ema_of_tag(model_ema: Any, saved: EmaFiles, timeout: float, io_timeout: float) -> None:
    """Reads what this rank needs of it. A meeting of all ranks."""
    sharded, path = isinstance(model_ema, ShardedEma), saved.tag

    def fits() -> bool:
        return sharded and saved.sharded and ema_fits_directly(model_ema, saved)

    if from_rank_0('compare EMA', fits, timeout):
        _verify(path, _own_ema, io_timeout)
        agree('read EMA', lambda: model_ema.load_shard(path), io_timeout, CheckpointError)
        return
    _verify(path, _share_of_ema, io_timeout)
    if sharded:
        agree('read EMA', lambda: load_other_ema(model_ema, saved), io_timeout, CheckpointError)
        return
    weights = agree('read EMA', lambda: read_whole_ema(saved), io_timeout, CheckpointError)
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


def _shards_of(path: Path, logger: logging.Logger) -> TagShards:
    shards = TagShards(path)
    _warn_unverified(shards, logger)
    if shards.unused:
        logger.warning(
            '%s has no manifest, and files that are not of its layout (%s): they are not read',
            path,
            few(shards.unused),
        )
    if unread := unread_keys(shards):
        logger.warning('%s: what its client_state has of %s is not restored', path, few(unread))
    return shards


def _warn_unverified(shards: TagShards, logger: logging.Logger) -> None:
    if not shards.has_manifest:
        logger.warning('%s has no manifest: it could not be verified', shards.tag)


def _verify(path: Path, choose: Callable[[Manifest], list[str]], timeout: float) -> None:
    """Compares files with their checksums, on this rank those that ``choose`` names.

    A meeting of all ranks.

    Raises:
        CheckpointError: on all ranks, when a file of any rank is damaged.
    """

    def check() -> None:
        manifest = lookup.read_manifest(path)
        found = [] if manifest is None else damage(path, manifest, choose(manifest))
        if found:
            raise CheckpointError('; '.join(found))

    agree('verify', check, timeout, CheckpointError)


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


def _fits_directly(engine: DeepSpeedEngine, path: Path, timeout: float, io_timeout: float) -> bool:
    """Whether DeepSpeed can load a tag by itself. Verifies what will be read, either way."""

    def same_layout() -> bool:
        return layout_of_tag(path) == layout_of_engine(engine)

    def groups_fit() -> bool:
        shards = TagShards(path)
        require_same_model(shards.shapes(), model_shapes(engine.module), str(path))
        return same_groups(engine, shards)

    if from_rank_0('compare layouts', same_layout, timeout):
        _verify(path, _own_shards, io_timeout)
        if from_rank_0('compare groups', groups_fit, timeout):
            return True
    _verify(path, _share_of_shards, io_timeout)
    return False
