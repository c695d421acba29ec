"""What ranks do in test_param_groups.py and test_schedule.py."""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_checkpoint,
    register,
    save_checkpoint,
)
from internvl_ds.dist.rendezvous import from_rank_0, rank
from internvl_ds.tools.cli import main
from tests.harness.model import make_config, make_model, micro_batch, zero_json
from tests.harness.saving import caught_warnings

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


class OwnSchedule:
    """An engine whose schedule DeepSpeed itself steps: the ds_config's, or one of torch's."""

    def __init__(self, root: str, kind: str, stage: int, seed: int = 0) -> None:
        model = make_model(seed)
        client = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        self.config = make_config(root, DATA__BATCH_SIZE=8)
        tree = {**zero_json(stage), 'zero_force_ds_cpu_optimizer': False}
        if kind == 'ds_config':
            warmup = {'warmup_min_lr': 0.0, 'warmup_max_lr': 0.01, 'warmup_num_steps': 10}
            tree['scheduler'] = {'type': 'WarmupLR', 'params': warmup}
            self.engine, self.optimizer = initialize(self.config, model, client, tree)
        else:
            tree.update(train_micro_batch_size_per_gpu=8, gradient_clipping=5.0)
            scheduler = torch.optim.lr_scheduler.StepLR(client, 3, gamma=0.5)
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=client, lr_scheduler=scheduler, config=tree
            )
            register(self.engine)
        self.scaler = NativeScalerWithGradNormCount()

    def lrs(self, first: int, last: int) -> list[float]:
        """Updates first..last-1; the lr now, and after each."""
        seen = [self.optimizer.param_groups[0]['lr']]
        for step in range(first, last):
            x, y = micro_batch(step, 0, 1, rank(), 2)
            self.scaler(nn.functional.cross_entropy(self.engine(x), y), self.optimizer, 5.0)
            seen.append(self.optimizer.param_groups[0]['lr'])
        return seen

    def load(self, path: str) -> None:
        self.config.defrost()
        self.config.MODEL.RESUME = path
        load_checkpoint(
            self.config, self.engine, self.optimizer, None, None, logging.getLogger('test')
        )


def move_own_schedules(root: str) -> dict[str, list[Any]]:
    """Kind -> what the run that goes on sees, and those that load its tag: as it is, into another
    layout, and exported; each with what was said of it."""
    found = {}
    for kind in ('ds_config', 'torch'):
        run = OwnSchedule(f'{root}/{kind}', kind, 1)
        run.lrs(0, 4)
        path = save_checkpoint(
            run.config, 0, run.engine, 0.0, run.optimizer, None, None, logging.getLogger('test')
        )
        exported = f'{root}/{kind}.pth'
        command = ['ckpt', 'export', path, exported]
        assert from_rank_0('export', lambda words=command: main(words), 60) == 0
        found[kind] = [run.lrs(4, 8)]
        run.engine.destroy()
        for source, stage in ((path, 1), (path, 2), (exported, 1)):
            other = OwnSchedule('', kind, stage, seed=9)
            with caught_warnings() as said:
                other.load(source)
            lines = [line for line in said if 'begun anew' in line]
            found[kind].append([*other.lrs(4, 8), *lines])
            other.engine.destroy()
    return found
