"""Chooses the `Wrapper` class of an engine, by the optimizer that DeepSpeed gave it."""

from __future__ import annotations

import functools
import logging

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from packaging.version import Version

from internvl_ds.dist.rendezvous import rank
from internvl_ds.errors import ConfigError
from internvl_ds.zero.stage_0 import ClientOptimizer, UnfusedOptimizer
from internvl_ds.zero.stage_1_2 import Stage1And2
from internvl_ds.zero.stage_3 import Stage3, Stage3Module
from internvl_ds.zero.wrapper import Wrapper

OLDEST = '0.18.9'  # as setup.cfg says; pip only warns of a conflict with another package
NEWEST = '0.19.8'  # DeepSpeed that the suite of this package has run on

_log = logging.getLogger(__name__)
_BY_STAGE: tuple[type[Wrapper], ...] = (UnfusedOptimizer, Stage1And2, Stage1And2, Stage3)


def wrap(engine: DeepSpeedEngine) -> Wrapper:
    """Makes the wrapper of an engine; nothing of the engine changes.

    Raises:
        ConfigError: for a DeepSpeed older than `OLDEST`. For FusedAdam in fp16 or bf16 at stage 0:
            the optimizer that DeepSpeed puts around it keeps its masters in one flat tensor.
    """
    _require_known(deepspeed.__version__)
    _warn_of_newer(deepspeed.__version__)
    client, stage = engine.basic_optimizer, int(engine.zero_optimization_stage())
    if type(engine.optimizer).__name__ == 'FP16_Optimizer':
        raise ConfigError(
            f'{type(client).__name__} with fp16 or bf16 at ZeRO stage 0 is not supported by this '
            'version; pass a torch optimizer to initialize, or use stage 1'
        )
    if client is None:
        return Stage3Module(engine) if stage == 3 else Wrapper(engine)
    return ClientOptimizer(engine) if engine.optimizer is client else _BY_STAGE[stage](engine)


def _require_known(version: str) -> None:
    if Version(version) < Version(OLDEST):
        raise ConfigError(
            f'DeepSpeed {version} trains some settings wrongly, and this package mends what '
            f'{OLDEST} and later ones do: install deepspeed>={OLDEST}'
        )


@functools.cache
def _warn_of_newer(version: str) -> None:
    known, running = Version(NEWEST).release[:2], Version(version).release[:2]
    if running > known and rank() == 0:
        _log.warning(
            'DeepSpeed %s is newer than what this version of internvl_ds was tried with (%s): '
            'compare the first updates with those of ZeRO stage 0 on one rank',
            version, NEWEST,
        )  # fmt: skip
