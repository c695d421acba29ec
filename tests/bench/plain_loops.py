"""The loops that `tests.bench.loop` compares with, each with its own meters, norm and scaler.

One is built as the original's classification main.py is, one as timm's train.py: an epoch under
DistributedDataParallel. Both read the loss on the host after every batch, as those do.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import AverageMeter, NativeScaler, dispatch_clip_grad, reduce_tensor
from torch import nn

from internvl_ds.metrics import MyAverageMeter

_log = logging.getLogger('bench.loop')


@dataclass
class Parts:
    """What a loop trains with.

    Attributes:
        schedule: has ``step_update``.
        autocast: to bfloat16.
        clip: the gradient's largest norm.
        every: micro-batches from one line of the log to the next.
        lap: called after every update.
    """

    model: nn.Module
    loader: Any
    optimizer: torch.optim.Optimizer
    schedule: Any
    criterion: Callable[..., torch.Tensor]
    device: torch.device
    autocast: bool
    clip: float
    every: int
    lap: Callable[[], None]

    def amp(self) -> Any:
        """The context of a forward pass."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def synchronize(self) -> None:
        """Waits for the device, as both loops do on a GPU."""
        if self.device.type == 'cuda':
            torch.cuda.synchronize()


class _ScalerWithNorm:
    """Scales, unscales, clips and steps, and returns the norm."""

    def __init__(self, device: torch.device) -> None:
        # bfloat16 and float32 need no scale; the calls are made all the same.
        self._scaler = torch.amp.GradScaler(device.type, enabled=False)

    def __call__(
        self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, clip: float,
        parameters: Iterable[nn.Parameter], update: bool,
    ) -> torch.Tensor | None:  # fmt: skip
        self._scaler.scale(loss).backward()
        if not update:
            return None
        self._scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        self._scaler.step(optimizer)
        self._scaler.update()
        return norm

    def scale(self) -> float:
        """The present scale, 1 where there is none."""
        return float(self._scaler.get_scale())


def as_the_original(parts: Parts, epoch: int) -> None:
    """One epoch as the original's train_one_epoch."""
    parts.model.train()
    parts.loader.sampler.set_epoch(epoch)
    parts.optimizer.zero_grad()
    scaler, steps = _ScalerWithNorm(parts.device), len(parts.loader)
    batch_time, losses, scales = AverageMeter(), AverageMeter(), AverageMeter()
    norms = MyAverageMeter(300)
    start = end = time.time()
    for index, (images, targets) in enumerate(parts.loader):
        images = images.to(parts.device, non_blocking=True)
        targets = targets.to(parts.device, non_blocking=True)
        with parts.amp():
            outputs = parts.model(images)
        loss = parts.criterion(outputs.float(), targets)
        norm = scaler(loss, parts.optimizer, parts.clip, parts.model.parameters(), True)
        parts.optimizer.zero_grad()
        parts.schedule.step_update(epoch * steps + index)
        parts.synchronize()
        losses.update(loss.item(), targets.size(0))
        assert norm is not None
        norms.update(norm.item())
        scales.update(scaler.scale())
        batch_time.update(time.time() - end)
        end = time.time()
        if index % parts.every == 0 and dist.get_rank() == 0:
            _log.info(
                f'Train: [{epoch}][{index}/{steps}] eta {batch_time.avg * (steps - index):.0f} '
                f'lr {parts.optimizer.param_groups[0]["lr"]:.10f} time {batch_time.val:.4f} '
                f'({batch_time.avg:.4f}) loss {losses.val:.4f} ({losses.avg:.4f}) grad_norm '
                f'{norms.val:.4f} ({norms.avg:.4f}/{norms.var:.4f}) scale {scales.val:.1f}'
            )
        parts.lap()
    _log.info(f'EPOCH {epoch} training takes {time.time() - start:.1f} s')


def as_timms(parts: Parts, epoch: int) -> None:
    """One epoch as timm's train_one_epoch, with its NativeScaler where it autocasts."""
    scaler = NativeScaler(parts.device.type) if parts.autocast else None
    update_time, data_time, losses = AverageMeter(), AverageMeter(), AverageMeter()
    parts.model.train()
    parts.loader.sampler.set_epoch(epoch)
    steps, samples = len(parts.loader), 0
    updates = epoch * steps
    began = started = time.time()
    parts.optimizer.zero_grad()
    for index, (images, targets) in enumerate(parts.loader):
        images, targets = images.to(parts.device), targets.to(parts.device)
        data_time.update(time.time() - began)
        with parts.amp():
            loss = parts.criterion(parts.model(images), targets)
        if scaler is not None:
            scaler(
                loss, parts.optimizer, clip_grad=parts.clip, clip_mode='norm',
                parameters=parts.model.parameters(), create_graph=False, need_update=True,
            )  # fmt: skip
        else:
            loss.backward(create_graph=False)
            dispatch_clip_grad(parts.model.parameters(), value=parts.clip, mode='norm')
            parts.optimizer.step()
        losses.update(loss.item(), images.size(0))
        samples += images.size(0)
        updates += 1
        parts.optimizer.zero_grad()
        parts.synchronize()
        now = time.time()
        update_time.update(now - started)
        started = now
        if index % parts.every == 0 or index == steps - 1:
            lrs = [group['lr'] for group in parts.optimizer.param_groups]
            ranks = dist.get_world_size()
            mean = reduce_tensor(loss.new([losses.avg]), ranks).item()
            last = reduce_tensor(loss.new([losses.val]), ranks).item()
            if dist.get_rank() == 0:
                _log.info(
                    f'Train: {epoch} [{index}/{steps}] Loss: {last:.3g} ({mean:.3g}) Time: '
                    f'{update_time.val:.3f}s, {samples * ranks / update_time.val:.2f}/s '
                    f'({update_time.avg:.3f}s) LR: {sum(lrs) / len(lrs):.3e} Data: '
                    f'{data_time.val:.3f} ({data_time.avg:.3f})'
                )
        parts.schedule.step_update(num_updates=updates, metric=losses.avg)
        samples = 0
        parts.lap()
        began = time.time()
