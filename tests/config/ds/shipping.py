"""What ranks do in test_ds_configs.py."""

from __future__ import annotations

from typing import Any

from internvl_ds import NativeScalerWithGradNormCount, initialize
from internvl_ds.dist.rendezvous import world_size
from tests.engine.stepping import masters, train_step
from tests.harness.model import make_config, make_model, make_optimizer, precision_values


def train_with_each(
    cells: list[tuple[str, str]], steps: int, accumulation: int
) -> list[dict[str, Any]]:
    """Trains a fresh model with each shipped ds_config; returns norms and final masters.

    Args:
        cells: names of the files, each with a precision as `precision_values` has it. A recipe,
            which states its precision, meets a yacs tree that leaves it open.
    """
    results = []
    for name, precision in cells:
        values = precision_values(precision)
        if not name.startswith('zero'):
            values = {'AMP_OPT_LEVEL': '', 'AMP_TYPE': 'float16'}
        config = make_config(
            DATA__BATCH_SIZE=16 // accumulation // world_size(),
            TRAIN__ACCUMULATION_STEPS=accumulation,
            **values,
        )
        model = make_model()
        engine, optimizer = initialize(config, model, make_optimizer(model), name)
        scaler = NativeScalerWithGradNormCount()
        norms = [
            float(train_step(engine, optimizer, scaler, step, None, accumulation)[0])
            for step in range(steps)
        ]
        results.append({'norms': norms, 'weights': masters(engine)})
        engine.destroy()
    return results
