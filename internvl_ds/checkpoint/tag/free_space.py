"""How many bytes this rank's part of a checkpoint will need."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.checkpoint.formats.snapshot import tensor_bytes
from internvl_ds.dist.rendezvous import rank
from internvl_ds.zero.master_weights import master_weights


def state_size(engine: DeepSpeedEngine) -> int:
    """Bytes of the tensors that DeepSpeed makes this rank save: an estimate from below.

    Stages 0 to 2: rank 0 saves the module; at stage 0 it saves all else too. Masters and optimizer
    state are saved by the rank that owns them.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0 and rank() != 0:
        return 0
    trees: list[Any] = []
    if rank() == 0 and stage < 3:
        trees.append(engine.module.state_dict())
    if engine.optimizer is not None and engine.basic_optimizer is not None:
        trees.append(list(engine.basic_optimizer.state.values()))
        if stage or hasattr(engine.optimizer, 'fp32_groups'):
            trees.append(master_weights(engine))
    return tensor_bytes(trees)
