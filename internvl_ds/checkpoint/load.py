"""load_checkpoint and load_ema_checkpoint. All ranks call them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from yacs.config import CfgNode

from internvl_ds.checkpoint import async_save as background
from internvl_ds.checkpoint.choice import choose
from internvl_ds.checkpoint.classes import require_same_classes
from internvl_ds.checkpoint.client_state import saved_state, unread_keys
from internvl_ds.checkpoint.formats.ema_files import EmaFiles
from internvl_ds.checkpoint.formats.ema_tensors import (
    count_on,
    ema_fits_directly,
    load_other_ema,
    load_whole_ema,
    read_whole_ema,
)
from internvl_ds.checkpoint.formats.loop_json import SavedLoop
from internvl_ds.checkpoint.formats.pth_format import weights_of_file
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.layout import (
    layout_of_engine,
    layout_of_tag,
    of_this_deepspeed,
    same_groups,
)
from internvl_ds.checkpoint.optimizer_state import require_optimizer
from internvl_ds.checkpoint.restore import load_weights, model_shapes, require_same_model
from internvl_ds.checkpoint.restore_scheduler import (
    require_schedule,
    restore_engines_own,
    restore_schedule,
    set_lr_of_schedule,
)
from internvl_ds.checkpoint.resume import (
    load_other_layout,
    load_same_layout,
    open_file,
    train_from_file,
)
from internvl_ds.checkpoint.sources import downloads
from internvl_ds.checkpoint.tag import discovery as lookup
from internvl_ds.checkpoint.tag.manifest import LOOP_FILE, STATE_FILE, Manifest, file_rank
from internvl_ds.checkpoint.tag.verify import damage, share_of
from internvl_ds.config.tree import checkpoint_option, get_option
from internvl_ds.dist.process_group import collectives_within
from internvl_ds.dist.rendezvous import agree, from_rank_0, rank, world_size
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.engine.registry import engine_of, find_engine, registration_of
from internvl_ds.engine.scheduling import restore_schedule_position
from internvl_ds.errors import CheckpointError, PretrainedError, few
from internvl_ds.files.reading import interpreting


def load_checkpoint(
    config: CfgNode,
    model: Any,
    optimizer: Any,
    lr_scheduler: Any,
    scaler: Any,
    logger: logging.Logger,
    *,
    loop: Any = None,
    class_names: Sequence[str] | None = None,
) -> float:
    """Loads MODEL.RESUME, or what OUTPUT holds. Every rank must call it.

    Unless EVAL_MODE: where OUTPUT holds a newer tag (saved later, in MODEL.RESUME's own directory;
    else further in training, or saved by a run that went on from this same MODEL.RESUME), that one
    is loaded, and a warning says so. TRAIN.AUTO_RESUME False loads MODEL.RESUME, also to go back to
    an earlier tag of OUTPUT; what is saved afterwards is then the newest, and the tags of later
    training stay until the run has come as far again (see `KeepLater`).

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
            taken), an original's .pth file, or the address of one. OUTPUT, TRAIN.AUTO_RESUME,
            EVAL_MODE, DATA.CHECK_CLASS_NAMES and CHECKPOINT are read too.
        model: the engine or its module; in EVAL_MODE also a plain module.
        optimizer: the engine's optimizer; not used in EVAL_MODE.
        lr_scheduler: restored through ``load_state_dict``; may be None.
        scaler: restored through ``load_state_dict``; may be None.
        logger: told what was loaded.
        loop: what `save_checkpoint` was given: its ``load_state_dict`` gets what this rank's
            ``state_dict`` said (rank 0's, on other ranks than before). Not called for a checkpoint
            without one.
        class_names: of the data of now, by label; compared with those that the checkpoint keeps.

    Returns:
        The saved max_accuracy; 0.0 when the checkpoint has none.

    Raises:
        CheckpointNotFound: when nothing is at the path.
        CheckpointMismatch: when it is of another model, of other trained parameters, another
            optimizer or other classes; before any state is changed.
        CheckpointError: when it cannot be read, or a file of it is not what was written; before
            any state is changed.
    """
    background.wait()
    timeout = checkpoint_option(config, 'RENDEZVOUS_TIMEOUT')
    io_timeout = checkpoint_option(config, 'IO_TIMEOUT')
    path = choose(config, logger) or _downloaded(config, io_timeout)
    where = str(path)
    logger.info('==============> Resuming from %s....................', where)
    eval_mode = get_option(config, 'EVAL_MODE', False)
    if not eval_mode:
        logger.info('resuming from %s', where)
    if class_names is not None:
        agree(
            'compare classes',
            lambda: require_same_classes(config, class_names, where, logger),
            io_timeout,
            CheckpointError,
        )
    if path.is_file():
        if eval_mode:
            with collectives_within(io_timeout):
                evaluate = functools.partial(_evaluate_file, where, model, logger)
                return agree('read weights', evaluate, io_timeout, CheckpointError)
        accuracy = train_from_file(config, where, model, lr_scheduler, scaler, logger)
        restore_engines_own(engine_of(model), lr_scheduler, None, where, logger)
        return accuracy
    if eval_mode:
        _verify(path, _share_of_weights, io_timeout)
        shards = agree('find shards', lambda: _shards_of(path, logger), timeout, CheckpointError)
        state = agree('read state', lambda: saved_state(shards), timeout, CheckpointError)

        def read_weights() -> dict[str, torch.Tensor]:
            with interpreting(path, CheckpointError):
                return shards.weights()

        weights = agree('read weights', read_weights, io_timeout, CheckpointError)
        with collectives_within(io_timeout):
            load_weights(find_engine(model) or model, weights, str(path))
    else:
        engine = engine_of(model)
        registration = registration_of(engine)
        wrapper = registration.wrapper
        require_optimizer(wrapper.client)
        direct = _fits_directly(engine, path, timeout, io_timeout)
        shards = agree('find shards', lambda: _shards_of(path, logger), timeout, CheckpointError)

        def read_state() -> tuple[SavedLoop, dict[str, Any]]:
            state = saved_state(shards)
            if lr_scheduler is None and engine.lr_scheduler is not None and not shards.has_manifest:
                state['lr_scheduler'] = None  # it is restored with the engine
            require_schedule(state, lr_scheduler, path)
            return SavedLoop(path, shards.world_size), state

        saved_loop, state = agree('read state', read_state, timeout, CheckpointError)

        def ready() -> None:  # all is checked, and the engine about to be changed
            saved_loop.restore_loop(loop, timeout)

        if direct:
            saved_by = str(state.get('optimizer_class') or '')
            load_same_layout(engine, shards, saved_by, ready, io_timeout, logger)
            wrapper.restore_scale(state.get('loss_scale'))
            restored = restore_schedule(config, state, lr_scheduler, scaler, path, logger)
            position = restore_schedule_position(engine, state.get('schedule'), restored)
            own = lr_scheduler is registration.scheduler
            if not restored or (own and not shards.has_manifest):  # else the lr is in the shards
                groups = wrapper.client.param_groups
                set_lr_of_schedule(lr_scheduler, groups, position if own else shards.updates)
        else:
            load_other_layout(
                config, engine, shards, state, lr_scheduler, scaler, ready, io_timeout, logger
            )
            saved = shards.head.get('lr_scheduler')
            restore_engines_own(engine, lr_scheduler, saved, path, logger)
        saved_loop.restore_generators(state, logger)
        if get_option(config, 'TRAIN.EMA.ENABLE', None) is False and EmaFiles(path):
            logger.info(
                '%s holds an EMA: load_ema_checkpoint goes on with it, and TRAIN.EMA.ENABLE True '
                'in the training program; otherwise the next tags have none',
                path,
            )
    logger.info('=> loaded successfully %s (epoch %s)', path, state.get('epoch', 'unknown'))
    return float(state.get('max_accuracy') or 0.0)


def load_ema_checkpoint(config: CfgNode, model_ema: Any, logger: logging.Logger) -> float:
    """Loads the averaged weights of what `load_checkpoint` loaded. Every rank must call it.

    Args:
        config: as in `load_checkpoint`: where that came first, the average is of the same tag.
        model_ema: a `ShardedEma`, or timm's ModelEma, ModelEmaV2 or ModelEmaV3; saved by any kind
            and layout. Its ``decay`` is set where the checkpoint has one.
        logger: warned when the checkpoint has no EMA; the average is then left as it is.

    Returns:
        The saved max_accuracy_ema; 0.0 when the checkpoint has none.

    Raises:
        CheckpointNotFound, CheckpointMismatch, CheckpointError: as `load_checkpoint`.
    """
    background.wait()
    timeout = checkpoint_option(config, 'RENDEZVOUS_TIMEOUT')
    io_timeout = checkpoint_option(config, 'IO_TIMEOUT')
    path = choose(config, logger, as_before=True) or _downloaded(config, io_timeout)
    where, configured = str(path), model_ema.decay
    if path.is_file():
        load = functools.partial(_load_ema_of_file, model_ema, where, logger)
        weights, state = agree('read EMA', load, io_timeout, CheckpointError)
    else:
        weights = False
        saved = agree('find EMA', lambda: EmaFiles(path), timeout, CheckpointError)
        if saved:
            weights = True
            _load_ema_of_tag(model_ema, saved, timeout, io_timeout)
        shards = agree('find shards', lambda: TagShards(path), timeout, CheckpointError)
        state = agree('read state', lambda: saved_state(shards), timeout, CheckpointError)
        _warn_unverified(shards, logger)
        if saved and not saved.sharded:
            count_on(model_ema, shards.updates, where, logger)
    if not weights:
        logger.warning('%s has no EMA: starting from the loaded weights', where)
    else:
        logger.info('loaded the EMA of %s', where)
    if state.get('ema_decay') is not None:
        model_ema.decay = state['ema_decay']
    if model_ema.decay != configured:
        logger.warning(
            '%s: its EMA goes on with its decay of %s; %s is configured now',
            where,
            model_ema.decay,
            configured,
        )
    return float(state.get('max_accuracy_ema') or 0.0)


def _load_ema_of_file(
    model_ema: Any, where: str, logger: logging.Logger
) -> tuple[bool, dict[str, Any]]:
    """Whether the file has averaged weights, which are loaded; and what it says of them."""
    checkpoint = open_file(where)
    weights = checkpoint.get('model_ema')
    if weights is not None:
        load_whole_ema(model_ema, weights, where)
        count_on(model_ema, None, where, logger)
    state = {key: checkpoint.get(key) for key in ('max_accuracy_ema', 'ema_decay')}
    return weights is not None, state


def _load_ema_of_tag(model_ema: Any, saved: EmaFiles, timeout: float, io_timeout: float) -> None:
    """Reads what this rank needs of it. A meeting of all ranks."""
    sharded, path = isinstance(model_ema, ShardedEma), saved.tag

    def fits() -> bool:
        with interpreting(path, CheckpointError):
            return sharded and saved.sharded and ema_fits_directly(model_ema, saved)

    direct = from_rank_0('compare EMA', fits, timeout)
    _verify(path, _own_ema if direct else _share_of_ema, io_timeout)

    def load() -> None:
        with interpreting(path, CheckpointError):
            if direct:
                model_ema.load_shard(saved)
            elif sharded:
                load_other_ema(model_ema, saved)
            else:
                load_whole_ema(model_ema, read_whole_ema(saved), str(path))

    agree('read EMA', load, io_timeout, CheckpointError)


def _shards_of(path: Path, logger: logging.Logger) -> TagShards:
    with interpreting(path, CheckpointError):
        shards = TagShards(path)
        _ = shards.world_size, shards.shapes()
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
    """What DeepSpeed and `SavedLoop` read on this rank, and state.json."""
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
    names = [n for n in manifest.files if n.endswith('_states.pt') or n == STATE_FILE]
    names += [n for n in manifest.files if n == LOOP_FILE.format(file_rank(n))]
    return share_of(names, rank(), world_size())


def _share_of_weights(manifest: Manifest) -> list[str]:
    """Of what `TagShards.weights` reads on every rank, the part that this one verifies for all."""
    ending = '_states.pt' if manifest.header.zero_stage == 3 else '_model_states.pt'
    names = [STATE_FILE, *(n for n in manifest.files if n.endswith(ending))]
    return share_of(names, rank(), world_size())


def _share_of_ema(manifest: Manifest) -> list[str]:
    """Of what `read_whole_ema` reads on every rank, the part that this one verifies for all."""
    return share_of(manifest.files, rank(), world_size())


def _downloaded(config: CfgNode, io_timeout: float) -> Path:
    """The file that MODEL.RESUME is the address of. A meeting of all ranks."""

    def download() -> Path:
        try:
            return Path(downloads.local(str(config.MODEL.RESUME), config))
        except PretrainedError as error:
            raise CheckpointError(str(error)) from error

    return agree('download', download, io_timeout, CheckpointError)


def _evaluate_file(resume: str, model: Any, logger: logging.Logger) -> float:
    checkpoint = open_file(resume)
    with interpreting(resume, CheckpointError):
        weights = weights_of_file(checkpoint, resume)
        accuracy = float(checkpoint.get('max_accuracy') or 0.0)
    load_weights(find_engine(model) or model, weights, resume)
    logger.info('=> loaded the weights of %s', resume)
    return accuracy


def _fits_directly(engine: DeepSpeedEngine, path: Path, timeout: float, io_timeout: float) -> bool:
    """Whether DeepSpeed can load a tag by itself. Verifies what will be read, either way."""

    def same_layout() -> bool:
        with interpreting(path, CheckpointError):
            same = layout_of_tag(path) == layout_of_engine(engine)
            return same and of_this_deepspeed(path)

    def groups_fit() -> bool:
        with interpreting(path, CheckpointError):
            shards = TagShards(path)
            require_same_model(shards.shapes(), model_shapes(engine.module), str(path))
            return same_groups(engine, shards)

    if from_rank_0('compare layouts', same_layout, timeout):
        _verify(path, _own_shards, io_timeout)
        if from_rank_0('compare groups', groups_fit, timeout):
            return True
    _verify(path, _share_of_shards, io_timeout)
    return False
