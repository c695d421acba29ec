"""What ranks do in test_ds_configs.py."""

from __future__ import annotations

from typing import Any

from internvl_ds import NativeScalerWithGradNormCount, initialize
from internvl_ds.dist.rendezvous import world_size
from tests.workers.model import make_config, make_model, make_optimizer, precision_values
from tests.workers.stepping import masters, train_step


def train_with_each(
    names: list[str], precisions: dict[str, str], steps: int, accumulation: int
) -> dict[str, Any]:
    """Trains a fresh model with each shipped ds_config; returns norms and final masters.

    Args:
        names: of the files. One that states its precision meets a yacs tree that leaves it open.
        precisions: the precision of each, as `precision_values` has them.
    """
    results = {}
    for name in names:
        values = precision_values(precisions[name])
        if precisions[name] in name:
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
        results[name] = {'norms': norms, 'weights': masters(engine)}
        engine.destroy()
    return results
