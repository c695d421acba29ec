"""load_checkpoint: loads MODEL.RESUME into an engine or a module."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.choice import choose, fetch_resume
from internvl_ds.checkpoint.direct_load import load_same_layout
from internvl_ds.checkpoint.direct_or_reshard import fits_directly
from internvl_ds.checkpoint.formats.client_state import saved_state, unread_keys
from internvl_ds.checkpoint.formats.ema_files import EmaFiles
from internvl_ds.checkpoint.formats.loop_json import SavedLoop
from internvl_ds.checkpoint.formats.pth_format import open_file, weights_of_file
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.frozen.omitting import adopt_origins
from internvl_ds.checkpoint.frozen.sources import named_in_config
from internvl_ds.checkpoint.load_by_name import load_other_layout, train_from_file
from internvl_ds.checkpoint.load_context import Load
from internvl_ds.checkpoint.optimizer_state import require_optimizer
from internvl_ds.checkpoint.restore import given_by_backbone, load_weights
from internvl_ds.checkpoint.restore_scheduler import require_schedule
from internvl_ds.checkpoint.sources.classes import require_same_classes
from internvl_ds.checkpoint.tag.verify import weight_files
from internvl_ds.config.tree import get_option
from internvl_ds.dist.process_group import collectives_within
from internvl_ds.engine.registry import engine_of, find_engine, wrapper_of
from internvl_ds.errors import CheckpointError, few
from internvl_ds.files.reading import interpreting


@named_in_config
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
    """Loads MODEL.RESUME, or a newer tag of OUTPUT. Collective: every rank calls it.

    Unless EVAL_MODE: weights, optimizer, scheduler, scaler and, on as many ranks as before, random
    number generators are restored, and TRAIN.START_EPOCH is set to the epoch to go on with. A tag
    of the same layout is loaded by DeepSpeed; any other, and a .pth, by the parameters' names, each
    rank reading its own part. TRAIN.AUTO_RESUME False loads MODEL.RESUME whatever OUTPUT holds.
    Files are compared with the manifest's checksums first; plain DeepSpeed's tags have none.

    Args:
        config: MODEL.RESUME is a tag, an output directory, an original's .pth or its address.
            OUTPUT, TRAIN, EVAL_MODE, DATA.CHECK_CLASS_NAMES and CHECKPOINT are read too.
        model: the engine or its module; in EVAL_MODE also a plain module.
        optimizer: the engine's optimizer.
        lr_scheduler, scaler: restored through ``load_state_dict``; may be None.
        logger: gets what was loaded.
        loop: what `save_checkpoint` was given; its ``load_state_dict`` gets this rank's state.
        class_names: of the data now, by label; compared with the names in the checkpoint.

    Returns:
        The saved max_accuracy; 0.0 when the checkpoint has none.

    Raises:
        CheckpointNotFound: when nothing is at the path.
        CheckpointMismatch: for another model, optimizer or classes; before any state is changed.
        CheckpointError: when a file cannot be read or is damaged; before any state is changed.
    """
    async_save.wait()
    load = Load(config, logger, lr_scheduler, scaler, loop)
    path = choose(config, logger) or fetch_resume(load)
    logger.info('==============> Resuming from %s....................', path)
    evaluates = get_option(config, 'EVAL_MODE', False)
    if not evaluates:
        logger.info('resuming from %s', path)
    if class_names is not None:
        load.agree(
            'compare classes', lambda: require_same_classes(config, class_names, str(path), logger)
        )
    if path.is_file():
        return (_evaluate_file if evaluates else train_from_file)(load, str(path), model)
    state = (_evaluate_tag if evaluates else _train_from_tag)(load, path, model)
    logger.info('=> loaded successfully %s (epoch %s)', path, state.get('epoch', 'unknown'))
    return float(state.get('max_accuracy') or 0.0)


def _evaluate_file(load: Load, where: str, model: Any) -> float:
    def evaluate() -> float:
        checkpoint = open_file(where)
        with interpreting(where, CheckpointError):
            weights = weights_of_file(checkpoint, where)
            accuracy = float(checkpoint.get('max_accuracy') or 0.0)
        engine = find_engine(model)
        given = given_by_backbone(model if engine is None else engine.module)
        load_weights(engine or model, weights, where, given)
        load.logger.info('=> loaded the weights of %s', where)
        return accuracy

    with collectives_within(load.io_timeout):
        return load.agree('read weights', evaluate)


def _evaluate_tag(load: Load, tag: Path, model: Any) -> dict[str, Any]:
    load.verify(tag, weight_files, shared=True)
    shards = load.agree('find shards', lambda: _shards_of(tag, load.logger), load.timeout)
    state = load.agree('read state', lambda: saved_state(shards), load.timeout)

    def read_weights() -> dict[str, torch.Tensor]:
        with interpreting(tag, CheckpointError):
            return shards.weights()

    weights = load.agree('read weights', read_weights)
    with collectives_within(load.io_timeout):
        load_weights(find_engine(model) or model, weights, str(tag))
    return state


def _train_from_tag(load: Load, tag: Path, model: Any) -> dict[str, Any]:
    engine = engine_of(model)
    wrapper_of(engine).require_own_weights('load_checkpoint')
    require_optimizer(wrapper_of(engine).client)
    direct = fits_directly(load, engine, tag)
    shards = load.agree('find shards', lambda: _shards_of(tag, load.logger), load.timeout)

    def read_state() -> tuple[SavedLoop, dict[str, Any]]:
        state = saved_state(shards)
        has_schedule = load.lr_scheduler is None and engine.lr_scheduler is not None
        if has_schedule and not shards.has_manifest:
            state['lr_scheduler'] = None  # it is restored with the engine
        require_schedule(state, load.lr_scheduler, tag)
        return SavedLoop(tag, shards.world_size), state

    saved_loop, state = load.agree('read state', read_state, load.timeout)

    def ready() -> None:  # all is checked, and the engine about to be changed
        saved_loop.restore_loop(load.loop, load.timeout)

    (load_same_layout if direct else load_other_layout)(load, engine, shards, state, ready)
    adopt_origins(engine.module, shards.head)
    saved_loop.restore_generators(state, load.logger)
    if get_option(load.config, 'TRAIN.EMA.ENABLE', None) is False and EmaFiles(tag):
        load.logger.info(
            f'{tag} holds an EMA: load_ema_checkpoint goes on with it, and TRAIN.EMA.ENABLE True '
            'in the training program; otherwise the next tags have none'
        )
    return state


def _shards_of(path: Path, logger: logging.Logger) -> TagShards:
    with interpreting(path, CheckpointError):
        shards = TagShards(path)
        _ = shards.world_size, shards.shapes()
    shards.warn_unverified(logger)
    if shards.unused:
        text = f'files that are not of its layout ({few(shards.unused)})'
        logger.warning(f'{path} has no manifest, and {text}: they are not read')
    if keys := unread_keys(shards):
        logger.warning('%s: what its client_state has of %s is not restored', path, few(keys))
    return shards
