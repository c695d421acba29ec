"""load_ema_checkpoint: loads the average that belongs to the loaded weights, of any kind."""

from __future__ import annotations

import logging
from typing import Any

from yacs.config import CfgNode

from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.choice import choose, fetch_resume
from internvl_ds.checkpoint.formats.client_state import saved_state
from internvl_ds.checkpoint.formats.ema_files import EmaFiles
from internvl_ds.checkpoint.formats.ema_tensors import (
    count_on,
    ema_fits_directly,
    load_other_ema,
    load_whole_ema,
    read_whole_ema,
)
from internvl_ds.checkpoint.formats.pth_format import open_file
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.frozen.sources import named_in_config
from internvl_ds.checkpoint.load_context import Load
from internvl_ds.checkpoint.tag.verify import ema_files_of_rank
from internvl_ds.dist.rendezvous import rank, ranks_of_host
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.errors import CheckpointError
from internvl_ds.files.reading import interpreting


@named_in_config
def load_ema_checkpoint(config: CfgNode, model_ema: Any, logger: logging.Logger) -> float:
    """Loads the averaged weights of what `load_checkpoint` loaded. Collective: every rank calls it.

    Args:
        config: as in `load_checkpoint`: where that came first, the average is of the same tag.
        model_ema: a `ShardedEma`, or timm's ModelEma, ModelEmaV2 or ModelEmaV3; saved by any kind
            and layout. Its ``decay`` is set where the checkpoint has one.
        logger: gets a warning when the checkpoint has no EMA; the average is then left as it is.

    Returns:
        The saved max_accuracy_ema; 0.0 when the checkpoint has none.

    Raises:
        CheckpointNotFound, CheckpointMismatch, CheckpointError: as `load_checkpoint`.
    """
    async_save.wait()
    load = Load(config, logger)
    path = choose(config, logger, as_before=True) or fetch_resume(load)
    where, decay = str(path), model_ema.decay
    if path.is_file():
        is_loaded, state = load.agree('read EMA', lambda: _load_file(model_ema, where, logger))
    else:
        files = load.agree('find EMA', lambda: EmaFiles(path), load.timeout)
        if is_loaded := bool(files):
            _load_tag(load, model_ema, files)
        shards = load.agree('find shards', lambda: TagShards(path), load.timeout)
        state = load.agree('read state', lambda: saved_state(shards), load.timeout)
        shards.warn_unverified(logger)
        if files and not files.sharded:
            count_on(model_ema, shards.updates, where, logger)
    if is_loaded:
        logger.info('loaded the EMA of %s', where)
    else:
        logger.warning('%s has no EMA: starting from the loaded weights', where)
    if state.get('ema_decay') is not None:
        model_ema.decay = state['ema_decay']
    if model_ema.decay != decay:
        text = f'its EMA goes on with its decay of {model_ema.decay}'
        logger.warning(f'{where}: {text}; {decay} is configured now')
    return float(state.get('max_accuracy_ema') or 0.0)


def _load_file(model_ema: Any, where: str, logger: logging.Logger) -> tuple[bool, dict[str, Any]]:
    """Loads averaged weights if the file has them; returns whether, and their header."""
    checkpoint = open_file(where)
    weights = checkpoint.get('model_ema')
    if weights is not None:
        load_whole_ema(model_ema, weights, where)
        count_on(model_ema, None, where, logger)
    return weights is not None, {k: checkpoint.get(k) for k in ('max_accuracy_ema', 'ema_decay')}


def _load_tag(load: Load, model_ema: Any, files: EmaFiles) -> None:
    """Reads what this rank needs of the average. Collective: every rank calls it."""
    has_shards, path = isinstance(model_ema, ShardedEma), files.tag

    def fits() -> bool:
        with interpreting(path, CheckpointError):
            return has_shards and files.sharded and ema_fits_directly(model_ema, files)

    direct = load.from_rank_0('compare EMA', fits)
    if direct:
        load.verify(
            path,
            lambda manifest: ema_files_of_rank(manifest, rank(), ranks_of_host()),
            shared=False,
        )
    else:
        load.verify(path, lambda manifest: manifest.files, shared=True)

    def read() -> None:
        with interpreting(path, CheckpointError):
            if direct:
                model_ema.load_shard(files)
            elif has_shards:
                load_other_ema(model_ema, files)
            else:
                load_whole_ema(model_ema, read_whole_ema(files), str(path))

    load.agree('read EMA', read)
