"""Chooses the `Wrapper` class of an engine, by the optimizer that DeepSpeed gave it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from packaging.version import Version

from internvl_ds.dist.rendezvous import rank
from internvl_ds.errors import ConfigError
from internvl_ds.zero.stage_0 import ClientOptimizer, UnfusedOptimizer
from internvl_ds.zero.stage_1_2 import Stage1And2
from internvl_ds.zero.stage_3 import Stage3, Stage3Module
from internvl_ds.zero.wrapper import Wrapper, replaced

NEWEST = '0.19.8'  # DeepSpeed that the suite of this package has run on

_log = logging.getLogger(__name__)
_BY_STAGE: tuple[type[Wrapper], ...] = (UnfusedOptimizer, Stage1And2, Stage1And2, Stage3)


def wrap(engine: DeepSpeedEngine) -> Wrapper:
    """Makes the wrapper of an engine; nothing of the engine changes.

    Raises:
        ConfigError: for FusedAdam in fp16 or bf16 at stage 0: the optimizer that DeepSpeed puts
            around it keeps its masters in one flat tensor. For bf16 at
            stage 1 before 0.18, where `sharding_bf16` was not around ``deepspeed.initialize``.
    """
    _warn_of_newer(deepspeed.__version__)
    client, stage = engine.basic_optimizer, int(engine.zero_optimization_stage())
    if type(engine.optimizer).__name__ == 'FP16_Optimizer':
        raise ConfigError(
            f'{type(client).__name__} with fp16 or bf16 at ZeRO stage 0 is not supported by this '
            'version; pass a torch optimizer to initialize, or use stage 1'
        )
    if stage and type(engine.optimizer).__name__ == 'FP16_UnfusedOptimizer':
        raise ConfigError(
            f'DeepSpeed {deepspeed.__version__} trains bf16 at ZeRO stage {stage} with '
            'FP16_UnfusedOptimizer, which shards nothing: make the engine with '
            'internvl_ds.initialize, use stage 2 or 3, or install deepspeed>=0.18'
        )
    if client is None:
        return Stage3Module(engine) if stage == 3 else Wrapper(engine)
    return ClientOptimizer(engine) if engine.optimizer is client else _BY_STAGE[stage](engine)


@contextmanager
def sharding_bf16() -> Iterator[None]:
    """Makes ``deepspeed.initialize`` in the block shard the optimizer of bf16 at stage 1.

    Before 0.18 DeepSpeed gives it the one of stage 0 (seen in 0.17.6: two kinds have one name).
    """
    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def choose_by_stage(engine: DeepSpeedEngine, optimizer: Any) -> Any:
        kind = choose(engine, optimizer)
        return ZERO_OPTIMIZATION if engine.zero_optimization_stage() else kind

    if Version(deepspeed.__version__) >= Version('0.18'):
        yield
        return
    with replaced(DeepSpeedEngine, '_do_optimizer_sanity_check', choose_by_stage):
        yield


@functools.cache
def _warn_of_newer(version: str) -> None:
    known, running = Version(NEWEST).release[:2], Version(version).release[:2]
    if running > known and rank() == 0:
        _log.warning(
            'DeepSpeed %s is newer than what this version of internvl_ds was tried with (%s): '
            'compare the first updates with those of ZeRO stage 0 on one rank',
            version, NEWEST,
        )  # fmt: skip
