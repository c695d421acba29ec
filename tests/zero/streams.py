"""What ranks do in test_streams.py: write weights at stage 3, beside a watching accelerator."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from internvl_ds import ShardedEma, initialize
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.zero import stage_3
from internvl_ds.zero.wrapper import replaced
from tests.harness.model import make_config, make_model, make_optimizer, zero_json


def written_before_synchronizing() -> list[bool]:
    """At each synchronization, whether the slices are what is to be computed with by then."""
    model = make_model()
    engine, _ = initialize(make_config(), model, make_optimizer(model), zero_json(3))
    wrapper, average = wrapper_of(engine), ShardedEma(engine, 0.5)
    lows = engine.optimizer.fp16_partitioned_groups_flat
    expected = [torch.full_like(low, 3.0) for low in lows]
    seen: list[bool] = []

    def synchronize() -> None:
        seen.append(all(map(torch.equal, lows, expected)))

    with replaced(stage_3, 'get_accelerator', lambda: SimpleNamespace(synchronize=synchronize)):
        for master in wrapper.flat_masters():
            master.data.fill_(3.0)
        wrapper.push_masters()
        with average.swapped_in():  # other weights
            pass
    return seen
