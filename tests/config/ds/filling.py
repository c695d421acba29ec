"""What ranks do in test_ds_fill.py."""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from typing import Any

import torch

from internvl_ds import NativeScalerWithGradNormCount, initialize, save_checkpoint
from internvl_ds.checkpoint.formats.state_json import state_of
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.registry import wrapper_of
from tests.harness.model import make_config, make_model, make_optimizer, micro_batch, zero_json
from tests.tools.plan.measuring import allocated

_STATED = 50_000_000


def buckets(output: str) -> dict[str, Any]:
    """Trains with the bucket filled, and with one stated, at stages 1 to 3."""
    found: dict[str, Any] = {}
    for stage in (1, 2, 3):
        found[str(stage)] = {
            name: _train(stage, size, Path(output) / f'{name}_{stage}')
            for name, size in (('filled', None), ('stated', _STATED))
        }
    found['trained'] = sum(p.numel() for p in make_model().parameters() if p.requires_grad)
    return found


def _train(stage: int, size: int | None, output: Path) -> dict[str, Any]:
    config = make_config(str(output), DATA__BATCH_SIZE=8 // world_size(), TRAIN__CLIP_GRAD=0.5)
    tree, model = zero_json(stage), make_model()
    if size is not None:
        tree['zero_optimization']['reduce_bucket_size'] = size
    gc.collect()
    before = allocated()
    engine, optimizer = initialize(config, model, make_optimizer(model), tree)
    scaler, steps = NativeScalerWithGradNormCount(), []
    for step in range(3):
        x, y = micro_batch(step, 0, 2, rank(), world_size())
        loss = torch.nn.functional.cross_entropy(engine(x), y)
        steps.append([loss.item(), scaler(loss, optimizer, clip_grad=0.5).item()])
    gc.collect()
    taken = allocated() - before
    tag = Path(
        save_checkpoint(config, 0, engine, 0.0, optimizer, None, scaler, logging.getLogger())
    )
    shard = torch.load(next(tag.glob('*model_states.pt')), weights_only=False)
    trees = (
        json.loads((output / 'ds_config.json').read_text()),
        state_of(tag)['ds_config'],
        shard['ds_config'],
    )
    key = 'reduce_bucket_size'
    result = {
        'steps': steps,
        'bytes': taken,
        'bucket': wrapper_of(engine).ds_config['zero_optimization'][key],
        'recorded': [tree['zero_optimization'][key] for tree in trees],
    }
    engine.destroy()
    return result


def json_optimizer() -> dict[str, Any]:
    """The settings of the optimizer that DeepSpeed makes of a section of 'auto's."""
    config = make_config(
        DATA__BATCH_SIZE=8,
        TRAIN__BASE_LR=1e-3,
        TRAIN__WEIGHT_DECAY=0.1,
        TRAIN__OPTIMIZER__BETAS=(0.9, 0.98),
    )
    section = {'type': 'AdamW', 'params': {'lr': 'auto', 'torch_adam': True}}
    engine, _ = initialize(config, make_model(), None, {'optimizer': section, **zero_json(1)})
    (group,) = engine.optimizer.param_groups
    return {
        'lr': group['lr'],
        'weight_decay': group['weight_decay'],
        'betas': list(group['betas']),
    }
