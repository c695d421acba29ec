"""What ranks do in test_original_pth.py: the training program, and a file of the original's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from internvl_ds import save_checkpoint
from internvl_ds.checkpoint.formats.export import write_original
from internvl_ds.dist.rendezvous import from_rank_0
from internvl_ds.train.model import build_model
from internvl_ds.train.optim import build_scheduler, scaled_lrs
from internvl_ds.train.setup import setup
from tests.harness.training import small_config
from tests.harness.whole_state import whole_state

BATCHES = 4  # of an epoch, on each of two ranks


def config_of(data: str, output: str, resume: str = '') -> CfgNode:
    return small_config(
        Path(data), OUTPUT=output, DATA__BATCH_SIZE=2, TRAIN__EPOCHS=3, TRAIN__WARMUP_EPOCHS=1,
        TRAIN__BASE_LR=1e-2, MODEL__RESUME=resume, SEED=3,
    )  # fmt: skip


def make(config: CfgNode) -> tuple[nn.Module, torch.optim.AdamW, Any]:
    """Plain parts: a group for each tensor, as the original's optimizer.py builds."""
    torch.manual_seed(11)
    model, lrs = build_model(config), scaled_lrs(config, 2)
    exempt = model.no_weight_decay()
    groups = [
        {'params': [p], 'weight_decay': 0.0 if p.dim() == 1 or name in exempt else 0.05,
         'lr': lrs.base, 'name': name}
        for name, p in model.named_parameters()
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=lrs.base, betas=(0.9, 0.999), eps=1e-8)
    return model, optimizer, build_scheduler(config, optimizer, BATCHES, lrs)


def write_pth(config: CfgNode, path: Path) -> None:
    """An epoch of plain training, saved as the original does."""
    model, optimizer, scheduler = make(config)
    for index in range(BATCHES):
        nn.functional.cross_entropy(
            model(torch.randn(4, 3, 16, 16)), torch.arange(4) % 3
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_update(index)
    content = {
        'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
        'lr_scheduler': scheduler.state_dict(), 'max_accuracy': 12.5, 'epoch': 0, 'config': config,
    }  # fmt: skip
    torch.save(content, path)


def resume(data: str, folder: str, stages: list[int]) -> dict[str, Any]:
    """The program from the file, at each stage; and its tag back as a file in the plain parts."""
    path = Path(folder, 'ckpt_epoch_0.pth')
    from_rank_0('write', lambda: write_pth(config_of(data, ''), path), 60)
    content = torch.load(path, weights_only=False)
    model, optimizer, _ = make(config_of(data, ''))
    model.load_state_dict(content['model'])
    optimizer.load_state_dict(content['optimizer'])
    found: dict[str, Any] = {}
    for stage in stages:
        config = config_of(data, f'{folder}/{stage}', str(path))
        ds_config = {'zero_optimization': {'stage': stage}}
        state = setup(config, ds_config, logging.getLogger('test'))
        masters, moments = whole_state(state.engine)
        differing = [
            name
            for name, p in model.named_parameters()
            if not torch.equal(masters[name], p.detach())
            or any(
                not torch.equal(moments[name][key], optimizer.state[p][key])
                for key in ('exp_avg', 'exp_avg_sq')
            )
        ]
        tag = save_checkpoint(
            config, 0, state.engine, 12.5, state.optimizer, state.scheduler, state.scaler,
            logging.getLogger('test'),
        )  # fmt: skip
        back = Path(folder, f'{stage}.pth')
        from_rank_0('export', lambda tag=tag, back=back: write_original(Path(tag), back), 60)
        found[str(stage)] = {
            'best': state.best, 'start': config.TRAIN.START_EPOCH, 'differing': differing,
            'groups': len(state.engine.basic_optimizer.param_groups), 'back': loaded(back, content),
        }  # fmt: skip
        state.engine.destroy()
    return found


def loaded(back: Path, content: dict[str, Any]) -> list[str]:
    """What differs where the original's own parts load an export, from what they saved."""
    again = torch.load(back, weights_only=False)
    model, optimizer, scheduler = make(config_of('', ''))
    model.load_state_dict(again['model'])
    optimizer.load_state_dict(again['optimizer'])
    scheduler.load_state_dict(again['lr_scheduler'])
    wanted = content['optimizer']['state']
    state = optimizer.state_dict()['state']
    differing = [
        n for n in content['model'] if not torch.equal(content['model'][n], again['model'][n])
    ]
    differing += [
        f'{number} {key}'
        for number, values in wanted.items()
        for key in ('exp_avg', 'exp_avg_sq', 'step')
        if not torch.equal(torch.as_tensor(values[key]), torch.as_tensor(state[number][key]))
    ]
    lists = ('base_values', 'warmup_steps')
    return differing + [
        key for key in lists if getattr(scheduler, key) != content['lr_scheduler'][key]
    ]
