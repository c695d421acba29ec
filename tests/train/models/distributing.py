"""What ranks do in the test of TRAIN.DIST_BN: an epoch of the program for each of its words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from internvl_ds.checkpoint.formats.compare import contents_of
from internvl_ds.train import loop
from internvl_ds.train.reporting.log import MetricsLog
from internvl_ds.train.setup import setup
from tests.harness.training import small_config

STATISTICS = ('norm.running_mean', 'norm.running_var')


def epochs(data: str, output: str, stage: int) -> dict[str, dict[str, Any]]:
    """How -> what this rank's module, average and tag hold after an epoch."""
    return {how: _epoch(data, Path(output) / (how or 'own'), stage, how) for how in HOWS}


HOWS = ('', 'reduce', 'broadcast')


def _epoch(data: str, output: Path, stage: int, how: str) -> dict[str, Any]:
    config = small_config(
        Path(data), OUTPUT=str(output), DATA__BATCH_SIZE=2, TRAIN__EPOCHS=1, TRAIN__DIST_BN=how,
        MODEL__FACTORY='tests.harness.training:brightness', TRAIN__EMA__ENABLE=True,
        TRAIN__EMA__DECAY=0.5, TRAIN__WARMUP_EPOCHS=0, TRAIN__AUTO_RESUME=False,
    )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    state = setup(config, {'zero_optimization': {'stage': stage}}, logging.getLogger('test'))
    loop._run_epoch(state, 0, MetricsLog(output / 'metrics.jsonl'))
    assert state.ema is not None
    buffers = dict(state.engine.module.named_buffers())
    saved = contents_of(output / 'ckpt_epoch_0').tensors
    return {
        'module': [buffers[name].tolist() for name in STATISTICS],
        'average': [state.ema.buffers()[name].tolist() for name in STATISTICS],
        'tag': [saved[f'model/{name}'].whole().tolist() for name in STATISTICS],
        'tag average': [saved[f'ema/{name}'].whole().tolist() for name in STATISTICS],
    }
