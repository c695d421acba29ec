"""What ranks do in test_reading_once.py: they resume, with the files noted whose bytes are read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from internvl_ds import auto_resume_helper, load_checkpoint, load_ema_checkpoint, save_checkpoint
from internvl_ds.checkpoint.tag import verify
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.engine.grad_scaler import NativeScalerWithGradNormCount
from tests.engine.stepping import make_engine, train_step
from tests.harness.model import make_config

_log = logging.getLogger('test')


def resume(output: str, stages: list[int]) -> list[dict[str, Any]]:
    """The files that are compared with their checksums: of a start, and of a second load."""
    return [_resume(f'{output}/{stage}', stage) for stage in stages]


def _resume(output: str, stage: int) -> dict[str, Any]:
    engine, optimizer = make_engine(stage, 'bf16')
    scaler, average = NativeScalerWithGradNormCount(), ShardedEma(engine, 0.9)
    train_step(engine, optimizer, scaler, 0, 0.5)
    config = make_config(output)
    save_checkpoint(config, 0, engine, 0.0, optimizer, None, scaler, _log, average, 0.0, 0.9)
    read: list[str] = []
    hash_file = verify.hash_file

    def noted(path: Path, *size: int) -> Any:
        read.append(path.name)
        return hash_file(path, *size)

    verify.hash_file = noted
    found = {}
    try:
        tag = auto_resume_helper(output, config=config)
        config.defrost()
        config.MODEL.RESUME = tag
        for name in ('start', 'again'):
            load_checkpoint(config, engine, optimizer, None, scaler, _log)
            load_ema_checkpoint(config, average, _log)
            found[name], read[:] = sorted(read), []
    finally:
        verify.hash_file = hash_file
    engine.destroy()
    return {**found, 'files': sorted(path.name for path in Path(str(tag)).iterdir())}
