"""What ranks do in test_streams.py: all that writes weights, on a device with streams."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from internvl_ds import (
    NativeScalerWithGradNormCount,
    ShardedEma,
    initialize,
    load_checkpoint,
    load_ema_checkpoint,
    save_checkpoint,
)
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.zero import stage_3
from tests.harness.clocks import Clocks
from tests.harness.model import make_config, make_model, make_optimizer, micro_batch, zero_json

_log = logging.getLogger(__name__)


def races(stage: int, output: str, mended: bool = True) -> dict[str, list[str]]:
    """What wrote weights -> the accesses that nothing orders, until the next forward pass is over.

    Args:
        stage: see `zero_json`; stages 1 and 2 reduce gradients on a stream of their own.
        output: of all ranks.
        mended: whether this package orders them; else DeepSpeed alone.
    """
    json = zero_json(stage)
    if stage in (1, 2):
        json['zero_optimization']['overlap_comm'] = True
    config = make_config(output)
    with Clocks() as clocks:
        model = make_model()
        engine, optimizer = initialize(config, model, make_optimizer(model), json)
        scaler, average = NativeScalerWithGradNormCount(), ShardedEma(engine, 0.5)
        if not mended:
            nothing = get_accelerator().Stream()
            stub = SimpleNamespace(synchronize=lambda: None, current_stream=lambda: nothing)
            stage_3.get_accelerator = lambda: stub  # type: ignore[attr-defined]

        def forward(step: int) -> torch.Tensor:
            x, y = micro_batch(step, 0, 1, rank(), world_size())
            return torch.nn.functional.cross_entropy(engine(x), y)

        def update() -> None:
            for step in range(3):
                scaler(forward(step), optimizer, 0.5, engine.parameters())
                average.update(engine)

        def swap() -> None:
            with average.swapped_in():
                forward(0)

        def save_and_load() -> None:
            arguments: Any = (optimizer, None, scaler, _log)
            tag = save_checkpoint(config, 0, engine, 0.0, *arguments, model_ema=average)
            again = make_config(output, MODEL__RESUME=tag)
            load_checkpoint(again, engine, *arguments)
            load_ema_checkpoint(again, average, _log)

        found = {}
        for name, write in {
            'update': update, 'push': wrapper_of(engine).push_masters, 'swap': swap,
            'load': save_and_load,
        }.items():  # fmt: skip
            clocks.races.clear()
            write()
            forward(0)
            found[name] = list(clocks.races)
    return found
