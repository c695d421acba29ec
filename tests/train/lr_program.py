"""The lr of each update: of the training program on ranks, and of the original's loop beside it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from yacs.config import CfgNode

from internvl_ds import NativeScalerWithGradNormCount, initialize, load_checkpoint, save_checkpoint
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.train.loop import train_one_epoch
from internvl_ds.train.optim import LinearSchedule
from internvl_ds.train.setup import setup
from tests.engine.scheduling import caught_warnings
from tests.harness.model import make_config, make_model, micro_batch, set_values, zero_json
from tests.harness.training import small_config

EPOCHS, SKIPPED = 3, 2  # the second update is skipped
_DCN = ('offset', 'attention_weights', 'center_feature_scale_proj', 'alpha_beta')


class Layered(nn.Module):
    """Says how deep its parameters are as the original's models do; one is in two of its words."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.offset = nn.Linear(4, 4)
        self.head = nn.Linear(4, classes)

    def lr_decay_keywords(self, decay_ratio: float = 0.95) -> dict[str, float]:
        shares = {f'blocks.{i}.': decay_ratio ** (2 - i) for i in range(2)}
        return {**shares, 'patch_embed': decay_ratio**3, 'embed.weight': 1000.0}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images.mean(dim=(2, 3)))
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.offset(x))


def layered(config: CfgNode) -> nn.Module:
    """For MODEL.FACTORY."""
    return Layered(config.MODEL.NUM_CLASSES)


def config_of(root: Path, name: str, steps: int, decay: bool, dcn: float | None) -> CfgNode:
    """One of the program's configurations; its numbers are none that are exact in binary."""
    return small_config(
        root, TRAIN__EPOCHS=EPOCHS, TRAIN__WARMUP_EPOCHS=1, TRAIN__ACCUMULATION_STEPS=steps,
        TRAIN__BASE_LR=0.3, TRAIN__WARMUP_LR=0.007, TRAIN__MIN_LR=0.011, DATA__BATCH_SIZE=2,
        TRAIN__LR_SCHEDULER__NAME=name, TRAIN__LR_SCHEDULER__DECAY_EPOCHS=1,
        TRAIN__LR_LAYER_DECAY=decay, TRAIN__OPTIMIZER__DCN_LR_MUL=dcn,
        TRAIN__OPTIMIZER__NAME='sgd', TRAIN__AUTO_RESUME=False,
        MODEL__FACTORY='tests.train.lr_program:layered',
    )  # fmt: skip


def plain_lrs(config: CfgNode, batches: int, ranks: int) -> list[dict[str, float]]:
    """The lr of each parameter at each update of the original's loop, restated.

    Args:
        batches: micro-batches of an epoch.
    """
    train, steps = config.TRAIN, max(1, config.TRAIN.ACCUMULATION_STEPS)
    base, warmup, least = (
        lr * config.DATA.BATCH_SIZE * ranks / 512.0
        for lr in (train.BASE_LR, train.WARMUP_LR, train.MIN_LR)
    )
    if steps > 1:
        base, warmup, least = base * steps, warmup * steps, least * steps
    model, groups = layered(config), []
    for name, parameter in model.named_parameters():
        lr = base
        if train.LR_LAYER_DECAY:
            words = model.lr_decay_keywords(train.LR_LAYER_DECAY_RATIO).items()
            share = next((share for word, share in words if word in name), None)
            lr = base if share is None else share * base
            if train.OPTIMIZER.DCN_LR_MUL is not None and any(part in name for part in _DCN):
                lr = train.OPTIMIZER.DCN_LR_MUL * lr
        groups.append({'params': [parameter], 'lr': lr, 'name': name})
    optimizer = torch.optim.SGD(groups, lr=base)
    scheduler = _plain_schedule(config, optimizer, batches, warmup, least)
    found = []
    for epoch in range(EPOCHS):
        for idx in range(batches):
            if (idx + 1) % steps == 0:
                found.append({group['name']: group['lr'] for group in optimizer.param_groups})
                if isinstance(scheduler, Scheduler):
                    scheduler.step_update(epoch * batches + idx)
                else:
                    scheduler(epoch * batches + idx)
    return found


def _plain_schedule(
    config: CfgNode, optimizer: Any, batches: int, warmup: float, least: float
) -> Any:
    train = config.TRAIN
    total, rising = int(train.EPOCHS * batches), int(train.WARMUP_EPOCHS * batches)
    if train.LR_SCHEDULER.NAME == 'cosine':
        return CosineLRScheduler(
            optimizer, t_initial=total, lr_min=least, warmup_lr_init=warmup, warmup_t=rising,
            cycle_limit=1, t_in_epochs=False,
        )  # fmt: skip
    if train.LR_SCHEDULER.NAME == 'step':
        return StepLRScheduler(
            optimizer, decay_t=int(train.LR_SCHEDULER.DECAY_EPOCHS * batches),
            decay_rate=train.LR_SCHEDULER.DECAY_RATE, warmup_lr_init=warmup, warmup_t=rising,
            t_in_epochs=False,
        )  # fmt: skip
    tops = [group['lr'] for group in optimizer.param_groups]

    def put(t: int) -> None:
        for group, top in zip(optimizer.param_groups, tops, strict=True):
            if t < rising:
                group['lr'] = warmup + t * ((top - warmup) / rising)
            else:
                group['lr'] = top - ((top - top * 0.01) * ((t - rising) / (total - rising)))

    if rising:
        put(0)
    return put


class Recording(NativeScalerWithGradNormCount):
    """Keeps the lr of each parameter when an update is made, and spoils one."""

    def __init__(self, names: Any) -> None:
        super().__init__()
        self.names, self.lrs = names, []

    def __call__(self, loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs['update_grad']:
            pairs = zip(optimizer.param_groups, self.names, strict=True)
            self.lrs.append({name: group['lr'] for group, names in pairs for name in names})
            if len(self.lrs) == SKIPPED:
                loss = loss * float('nan')
        return super().__call__(loss, optimizer, *args, **kwargs)


def follow(data: str, output: str, cells: list[tuple]) -> list[dict[str, Any]]:
    """Trains each (stage, schedule, accumulation, layer decay, DCN_LR_MUL) and the plain loop."""
    found = []
    for index, (stage, *settings) in enumerate(cells):
        config = config_of(Path(data), *settings)
        config.OUTPUT = f'{output}/{index}'
        state = setup(config, zero_json(stage), logging.getLogger('test'))
        groups = [group['param_names'] for group in state.optimizer.param_groups]
        state.scaler = scaler = Recording(groups)
        for epoch in range(EPOCHS):
            train_one_epoch(state, epoch)
            state.position.reset()
        batches, steps = len(state.loaders.train), max(1, config.TRAIN.ACCUMULATION_STEPS)
        per_epoch = -(-batches // steps)
        whole = [lrs for i, lrs in enumerate(scaler.lrs) if i % per_epoch < batches // steps]
        assert sorted(whole[0]) == sorted(dict(state.engine.module.named_parameters()))
        found.append({'got': whole, 'wanted': plain_lrs(config, batches, world_size())})
        state.engine.destroy()
    return found


class _Run:
    """An engine with layer decay and a schedule: of now, or as earlier versions made it."""

    def __init__(self, stage: int, kind: str, earlier: bool, output: str = '') -> None:
        self.config = make_config(
            output, DATA__BATCH_SIZE=4, TRAIN__EPOCHS=4, TRAIN__ACCUMULATION_STEPS=2
        )
        model, groups = make_model(), []
        for name, parameter in model.named_parameters():
            scale = 0.5 if 'stem' in name else 1.0
            then = {'initial_lr': 0.1, 'lr_scale': scale} if earlier else {}
            if parameter.requires_grad:
                groups.append({'params': [parameter], 'lr': 0.1 * scale, **then})
        client = torch.optim.SGD(groups, momentum=0.9)
        shared = {'warmup_t': 2, 'warmup_lr_init': 0.01, 't_in_epochs': False}
        if kind == 'cosine':
            length = {'t_initial': 8 if earlier else 16, 'lr_min': 0.02}
            self.scheduler: Scheduler = CosineLRScheduler(client, **length, **shared)
        elif earlier:
            self.scheduler = PolyLRScheduler(
                client, t_initial=6, power=1.0, lr_min=0.001, warmup_prefix=True, **shared
            )
        else:
            self.scheduler = LinearSchedule(client, 16, 4, 0.01)
        self.engine, self.optimizer = initialize(
            self.config, model, client, zero_json(stage), lr_scheduler=self.scheduler,
            schedule_in='updates' if earlier else 'original',
        )  # fmt: skip
        self.scaler = NativeScalerWithGradNormCount()

    def lrs(self) -> dict[str, float]:
        groups = self.optimizer.param_groups
        return {name: group['lr'] for group in groups for name in group['param_names']}

    def updates(self, steps: range) -> list[dict[str, float]]:
        """The lrs that each of these updates is made with."""
        found = []
        for step in steps:
            found.append(self.lrs())
            for micro in range(2):
                x, y = micro_batch(step, micro, 2, rank(), world_size())
                loss = nn.functional.cross_entropy(self.engine(x), y) / 2
                self.scaler(loss, self.optimizer, 1.0, update_grad=micro == 1)
        return found

    def files(self) -> tuple:
        return self.optimizer, self.scheduler, self.scaler, logging.getLogger('test')


def go_on_from_earlier(root: str, cells: list[tuple[int, int, str]]) -> list[dict[str, Any]]:
    """From a tag as an earlier version saved it, in each (stage, stage of now, schedule)."""
    found = []
    for index, (stage, now, kind) in enumerate(cells):
        run = _Run(stage, kind, earlier=True, output=f'{root}/{index}')
        run.updates(range(4))
        tag = save_checkpoint(run.config, 0, run.engine, 0.0, *run.files())
        wanted = run.updates(range(4, 7))
        run.engine.destroy()
        run = _Run(now, kind, earlier=False)
        with caught_warnings() as warned:
            set_values(run.config.defrost() or run.config, {'MODEL__RESUME': tag})
            load_checkpoint(run.config, run.engine, *run.files())
            got = run.updates(range(4, 7))
        found.append({'got': got, 'wanted': wanted, 'warned': warned})
        run.engine.destroy()
    return found
