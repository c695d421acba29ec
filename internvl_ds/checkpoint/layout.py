"""The layout of a tag and of an engine: whether DeepSpeed can load the one into the other."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds import ds_config as ds
from internvl_ds.checkpoint.restore import model_shapes, require_same_model
from internvl_ds.checkpoint.shards import TagShards
from internvl_ds.comm import world_size
from internvl_ds.config import default_config
from internvl_ds.errors import CheckpointMismatch


def require_same_layout(engine: DeepSpeedEngine, shards: TagShards) -> None:
    """Refuses a tag of another model, ZeRO stage, world size, precision or set of groups.

    Raises:
        CheckpointMismatch: names the tag, and both sides of what differs.
    """
    path = shards.tag
    require_same_model(shards.shapes(), model_shapes(engine.module), str(path))
    saved = {
        'ZeRO stage': shards.zero_stage,
        'world size': shards.world_size,
        'precision': precision_of(shards.head.get('ds_config') or {}),
    }
    running = {
        'ZeRO stage': engine.zero_optimization_stage(),
        'world size': world_size(),
        'precision': precision_of(engine.config),
    }
    differing = [
        f'{k} {saved[k]}, and this run has {running[k]}' for k in saved if saved[k] != running[k]
    ]
    if differing:
        raise CheckpointMismatch(
            f'{path}: saved with {"; ".join(differing)}. This version resumes training into the '
            'same layout only; EVAL_MODE loads the weights into any.'
        )
    groups, now = shards.groups(), _groups_of(engine)
    if not _same_groups(groups, now):
        raise CheckpointMismatch(
            f'{path}: its optimizer has {len(groups)} parameter groups with '
            f'{[len(g) for g in groups]} tensors, and this run has {len(now)} with '
            f'{[len(g) for g in now]}: weight decay, layer decay or frozen layers changed'
        )


def _groups_of(engine: DeepSpeedEngine) -> list[list[str]]:
    if engine.zero_optimization_stage():
        return [list(group) for group in engine._get_zero_param_shapes()]
    groups = engine.optimizer.param_groups
    return [group.get('param_names') or [''] * len(group['params']) for group in groups]


def _same_groups(saved: list[list[str]], running: list[list[str]]) -> bool:
    if [len(group) for group in saved] != [len(group) for group in running]:
        return False
    return all(
        not a or not b or a == b
        for one, other in zip(saved, running, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def precision_of(ds_config: Any) -> str:
    """The precision that a ds_config trains in, where what it leaves out is off."""
    tree = ds_config if isinstance(ds_config, dict) else {}
    return ds.precision(
        {**{b: {'enabled': False} for b in ('fp16', 'bf16', 'torch_autocast')}, **tree},
        default_config(),
    )
