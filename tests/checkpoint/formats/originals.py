"""A plain PyTorch loop that saves as the original does, and engines that go on from its files."""

from __future__ import annotations

from typing import Any

import torch
from timm.utils import ModelEma
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from internvl_ds import load_ema_checkpoint
from internvl_ds.config.tree import default_config
from internvl_ds.dist.reduce import reduce_tensor
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from tests.harness.elastic import Net, Run, full_state, logger, make_client, make_scheduler
from tests.harness.model import micro_batch

EPOCHS, UPDATES_PER_EPOCH = 10, 3  # the schedule of `make_scheduler` is 30 updates long


class Loop:
    """DDP, a torch optimizer, timm's schedule, an EMA: the original's loop."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        self.client = make_client(self.model, kind)
        self.scheduler = make_scheduler(self.client)
        self.ddp = DistributedDataParallel(self.model)
        self.ema = ModelEma(self.model, decay=0.9)

    def steps(self, first: int, last: int) -> list[float]:
        seen = []
        for step in range(first, last):
            x, y = micro_batch(step, 0, 1, rank(), world_size())
            loss = nn.functional.cross_entropy(self.ddp(x), y)
            self.client.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.client.step()
            self.ema.update(self.model)
            self.scheduler.step_update(step + 1)
            seen.append(float(reduce_tensor(loss)))
        return seen

    def save(self, path: str, epoch: int) -> None:
        """The original's dictionary, on rank 0."""
        config = default_config()
        config.TRAIN.EPOCHS = EPOCHS
        state = {
            'model': self.model.state_dict(),
            'optimizer': self.client.state_dict(),
            'lr_scheduler': self.scheduler.state_dict(),
            'max_accuracy': 61.5,
            'epoch': epoch,
            'config': config,
            'amp': torch.amp.GradScaler('cpu').state_dict(),
            'model_ema': self.ema.ema.state_dict(),
            'max_accuracy_ema': 62.5,
            'ema_decay': 0.9,
        }
        if rank() == 0:
            torch.save(state, path)
        torch.distributed.barrier()

    def load(self, path: str) -> int:
        """As the original's ``load_checkpoint`` does; returns the epoch to go on with."""
        state = torch.load(path, map_location='cpu', weights_only=False)
        missing = self.model.load_state_dict(state['model'], strict=False)
        assert not missing.missing_keys, missing
        assert not missing.unexpected_keys, missing
        self.client.load_state_dict(state['optimizer'])
        self.scheduler.load_state_dict(state['lr_scheduler'])
        torch.amp.GradScaler('cpu').load_state_dict(state['amp'])
        assert state['config'].TRAIN.EPOCHS >= 1
        self.ema.ema.load_state_dict(state['model_ema'])
        return state['epoch'] + 1

    def lrs(self) -> list[float]:
        return [group['lr'] for group in self.client.param_groups]


def train_and_save(root: str, kind: str) -> dict[str, Any]:
    """An epoch, the file, and what the loop that does not stop sees next."""
    loop = Loop(kind)
    loop.steps(0, UPDATES_PER_EPOCH)
    loop.save(f'{root}/ckpt_epoch_0.pth', 0)
    lrs = loop.lrs()
    ema = {n: t.flatten().tolist() for n, t in loop.ema.ema.state_dict().items()}
    return {'losses': loop.steps(3, 9), 'lrs': lrs, 'weights': _weights(loop.model), 'ema': ema}


def resume_in_engine(root: str, kind: str, stage: int) -> dict[str, Any]:
    """From the loop's file into an engine, three updates, a tag."""
    run = Run(stage, f'{root}/{kind}{stage}', seed=9, kind=kind)
    accuracy = run.load(f'{root}/ckpt_epoch_0.pth')
    ema = ShardedEma(run.engine, 0.5)
    accuracy_ema = load_ema_checkpoint(run.config, ema, logger)
    key = ('exp_avg',) if kind == 'adamw' else ('momentum_buffer',)
    found = {
        'accuracy': [accuracy, accuracy_ema, ema.decay],
        'epoch': run.config.TRAIN.START_EPOCH,
        'updates': run.engine.global_steps,
        'settings': run.settings(),
        'state': sorted(full_state(run.engine, key)),
        'losses': run.steps(3, 6),
    }
    found['path'] = save(run, ema)
    return found


def save(run: Run, ema: ShardedEma) -> str:
    from internvl_ds import save_checkpoint

    return save_checkpoint(
        run.config, 1, run.engine, 63.0, run.optimizer, run.scheduler, run.scaler, logger,
        model_ema=ema, max_accuracy_ema=64.0, ema_decay=0.9,
    )  # fmt: skip


def resume_in_loop(path: str, kind: str) -> dict[str, Any]:
    """From an exported file back into the loop."""
    loop = Loop(kind, seed=5)
    epoch = loop.load(path)
    lrs = loop.lrs()
    ema = {n: t.flatten().tolist() for n, t in loop.ema.ema.state_dict().items()}
    losses = loop.steps(6, 9)
    return {
        'epoch': epoch,
        'lrs': lrs,
        'losses': losses,
        'weights': _weights(loop.model),
        'ema': ema,
    }


def _weights(model: nn.Module) -> dict[str, list[float]]:
    return {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}
