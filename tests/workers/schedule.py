"""What ranks do in test_param_groups.py."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from internvl_ds import NativeScalerWithGradNormCount, initialize
from internvl_ds.meetings import rank
from tests.workers.model import make_config, make_model, micro_batch, zero_json

STEPS, SKIPPED = 50, 17


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """One group a tensor with layer decay, and an empty one in between."""
    scale = {'stem': 0.25, 'norm': 0.5, 'body': 0.5, 'tied': 0.7, 'head': 1.0}
    groups: list[dict[str, Any]] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decay = 0.0 if p.dim() == 1 else 0.05
        lr = 1e-2 * scale[name.split('.')[0]]
        groups.append({'params': [p], 'weight_decay': decay, 'lr': lr, 'name': name})
        if name == 'stem.bias':
            groups.append({'params': [], 'weight_decay': 0.3, 'lr': 9.0, 'name': 'empty'})
    return groups


def _scheduler(optimizer: torch.optim.Optimizer) -> CosineLRScheduler:
    return CosineLRScheduler(
        optimizer, t_initial=40, lr_min=1e-5, warmup_t=8, warmup_lr_init=1e-4, t_in_epochs=False
    )


def fifty_steps() -> dict[str, Any]:
    """The lr of each parameter after each boundary; update 17 has a nan and is skipped."""
    plain = torch.optim.AdamW(_groups(make_model()))
    names = [g['name'] for g in plain.param_groups]
    scheduler, applied, expected = _scheduler(plain), 0, []
    for step in range(STEPS):
        if step != SKIPPED:
            applied += 1
            scheduler.step_update(applied)
        lrs = {n: g['lr'] for n, g in zip(names, plain.param_groups, strict=True)}
        lrs.pop('empty')
        expected.append(lrs)
    decay = {g['name']: g['weight_decay'] for g in plain.param_groups if g['params']}
    results: dict[str, Any] = {'expected': expected, 'weight_decay': decay}
    for stage in range(4):
        model = make_model()
        client = torch.optim.AdamW(_groups(model))
        before = len(client.param_groups)
        scheduler = _scheduler(client)
        config = make_config(DATA__BATCH_SIZE=8)
        engine, optimizer = initialize(
            config, model, client, zero_json(stage), lr_scheduler=scheduler
        )
        scaler = NativeScalerWithGradNormCount()
        seen = []
        for step in range(STEPS):
            x, y = micro_batch(step, 0, 1, rank(), 2)
            loss = nn.functional.cross_entropy(engine(x), y)
            if step == SKIPPED and rank() == 0:
                loss = loss * float('nan')
            scaler(loss, optimizer, 5.0)
            seen.append(_per_name(optimizer, 'lr'))
        results[str(stage)] = {
            'lrs': seen,
            'weight_decay': _per_name(optimizer, 'weight_decay'),
            'groups': len(optimizer.param_groups),
            'groups_before': before,
            'skipped': engine.skipped_steps,
        }
        engine.destroy()
    return results


def _per_name(optimizer: Any, key: str) -> dict[str, float]:
    return {n: g[key] for g in optimizer.param_groups for n in g['param_names']}
