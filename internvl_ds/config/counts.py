"""The limits of settings that are counts or durations."""

from __future__ import annotations

from collections.abc import Sequence

from yacs.config import CfgNode

from internvl_ds.config.tree import default_of, get_option
from internvl_ds.errors import ConfigError

# The least value of each; None for any.
_LEAST: dict[str, int | None] = {
    'DATA.BATCH_SIZE': 1, 'DATA.IMG_SIZE': 1, 'DATA.NUM_WORKERS': 0, 'DATA.WORKER_TIMEOUT': 1,
    'DATA.REPEATED_AUG': 0,
    'MODEL.NUM_CLASSES': 0,
    'TRAIN.START_EPOCH': 0, 'TRAIN.EPOCHS': 0, 'TRAIN.WARMUP_EPOCHS': 0,
    'TRAIN.ACCUMULATION_STEPS': 0, 'TRAIN.LR_SCHEDULER.DECAY_EPOCHS': 1,
    'TRAIN.MAX_CONSECUTIVE_OVERFLOWS': 0, 'TRAIN.SAVE_STEPS': 0, 'TRAIN.SAVE_MINUTES': 0,
    'BENCH.UPDATES': 0, 'BENCH.WARMUP': 0, 'SAVE_FREQ': 0, 'PRINT_FREQ': 0, 'EVAL_FREQ': 0,
    **{
        f'MODEL.{section}.{size}': 1
        for section in ('INTERN_VIT_6B', 'CLIP_VIT')
        for size in ('PATCH_SIZE', 'PRETRAIN_SIZE', 'EMBED_DIM', 'NUM_HEADS', 'DEPTH')
    },
    # The adapters read only these of another script's tree.
    'SAVE_CKPT_NUM': None, 'CHECKPOINT.RENDEZVOUS_TIMEOUT': 1, 'CHECKPOINT.IO_TIMEOUT': 1,
    'CHECKPOINT.ASYNC_MEMORY': 0, 'CHECKPOINT.ASYNC_RATE': 0, 'CHECKPOINT.MIRROR_WAIT': 0,
    'CHECKPOINT.KEEP_BEST': 0, 'CHECKPOINT.KEEP_EVERY': 0, 'CHECKPOINT.KEEP_STEPS': 0,
    'COMM.TIMEOUT': 1, 'COMM.INIT_TIMEOUT': 1, 'COMM.EXIT_TIMEOUT': 1, 'COMM.DEAD_AFTER': 1,
    'COMM.SILENT_AFTER': 1, 'COMM.CONNECT_TIMEOUT': 1, 'COMM.ABORT_TIMEOUT': 1,
    'COMM.WARN_AFTER': 0,
}  # fmt: skip


def require_counts(config: CfgNode, beginnings: Sequence[str] = ('',)) -> None:
    """Refuses counts and durations out of range, before anything is computed with them.

    Args:
        config: any tree; a setting that it lacks has its default.
        beginnings: of the keys to look at; by default all.

    Raises:
        ConfigError: names the first one.
    """
    for key in (key for key in _LEAST if key.startswith(tuple(beginnings))):
        value, least = get_option(config, key), _LEAST[key]
        if value is None and key == 'TRAIN.ACCUMULATION_STEPS':
            value = 0
        kinds = int if isinstance(default_of(key), int) else int | float
        if not isinstance(value, kinds) or (least is not None and not value >= least):
            at_least = '' if least is None else f' of at least {least}'
            raise ConfigError(f'{key} is {value!r}; it takes a number{at_least}')


def require_linear_drop_path(config: CfgNode) -> None:
    """Refuses MODEL.DROP_PATH_TYPE other than linear, unless a MODEL.FACTORY reads it.

    Raises:
        ConfigError: for another than 'linear'.
    """
    kind = get_option(config, 'MODEL.DROP_PATH_TYPE')
    if kind != 'linear' and not get_option(config, 'MODEL.FACTORY'):
        raise ConfigError(
            f"MODEL.DROP_PATH_TYPE is {kind!r}, and the models of MODEL.TYPE have 'linear' alone: "
            'set that, or MODEL.FACTORY to a function whose model takes it'
        )
