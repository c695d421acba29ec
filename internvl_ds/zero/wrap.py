"""Chooses the `Wrapper` class of an engine, by the optimizer that DeepSpeed gave it."""

from __future__ import annotations

import functools
import logging

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from packaging.version import Version

from internvl_ds.dist.rendezvous import rank
from internvl_ds.errors import ConfigError
from internvl_ds.zero.stage_0 import (
    ClientOptimizer,
    ClientOptimizerBefore018,
    ModuleBefore018,
    UnfusedOptimizer,
    UnfusedOptimizerBefore018,
)
from internvl_ds.zero.stage_1_2 import Stage1And2, Stage1And2Before018
from internvl_ds.zero.stage_3 import Stage3, Stage3Module
from internvl_ds.zero.wrapper import Wrapper

NEWEST = '0.19.8'  # DeepSpeed that the suite of this package has run on

_log = logging.getLogger(__name__)
# Without an optimizer, with the client's own, and with DeepSpeed's by stage.
_KINDS: tuple[type[Wrapper], ...] = (
    (Wrapper, ClientOptimizer, UnfusedOptimizer, Stage1And2, Stage1And2, Stage3)
    if Version(deepspeed.__version__) >= Version('0.18')
    else (ModuleBefore018, ClientOptimizerBefore018, UnfusedOptimizerBefore018,
          Stage1And2Before018, Stage1And2Before018, Stage3)
)  # fmt: skip


def wrap(engine: DeepSpeedEngine) -> Wrapper:
    """Makes the wrapper of an engine; nothing of the engine changes.

    Raises:
        ConfigError: for FusedAdam in fp16 or bf16 at stage 0: the optimizer that DeepSpeed puts
            around it keeps its masters in one flat tensor.
    """
    _warn_of_newer(deepspeed.__version__)
    client, stage = engine.basic_optimizer, int(engine.zero_optimization_stage())
    if type(engine.optimizer).__name__ == 'FP16_Optimizer':
        raise ConfigError(
            f'{type(client).__name__} with fp16 or bf16 at ZeRO stage 0 is not supported by this '
            'version; pass a torch optimizer to initialize, or use stage 1'
        )
    if client is None:
        return Stage3Module(engine) if stage == 3 else _KINDS[0](engine)
    return _KINDS[1 if engine.optimizer is client else 2 + stage](engine)


@functools.cache
def _warn_of_newer(version: str) -> None:
    known, running = Version(NEWEST).release[:2], Version(version).release[:2]
    if running > known and rank() == 0:
        _log.warning(
            'DeepSpeed %s is newer than what this version of internvl_ds was tried with (%s): '
            'compare the first updates with those of ZeRO stage 0 on one rank',
            version, NEWEST,
        )  # fmt: skip
