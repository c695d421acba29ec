"""Reports an epoch while it runs: meters without device synchronization, log lines, a bar."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from timm.utils import AverageMeter
from tqdm import tqdm
from yacs.config import CfgNode

from internvl_ds.metrics import MyAverageMeter
from internvl_ds.train.reporting.log import PROGRESS

_NORM_WINDOW = 300  # updates that the mean and deviation of the gradient norm cover


class Progress:
    """Collects one epoch's losses and norms, and writes a line every PRINT_FREQ micro-batches.

    With 0 the only line is the one after the last. Losses and norms stay tensors until a line is
    due: reading one makes the host wait for the device, so only a line does.
    """

    def __init__(
        self,
        config: CfgNode,
        epoch: int,
        micro_batches: int,
        world_size: int,
        logger: logging.Logger,
        show_bar: bool = False,
        start: int = 0,
        meters: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts the epoch's clock.

        Args:
            config: PRINT_FREQ, DATA.BATCH_SIZE and TRAIN.EPOCHS are read.
            epoch: counted from 0.
            micro_batches: how many the epoch has, on each rank.
            world_size: how many ranks train.
            logger: takes the lines.
            show_bar: whether to show a progress bar beside them.
            start: how many of the micro-batches were done before this process.
            meters: what `state_dict` told then.
        """
        self.losses = AverageMeter()
        self.norms = MyAverageMeter(_NORM_WINDOW)
        self._config, self._epoch, self._micro_batches = config, epoch, micro_batches
        self._images_per_step = config.DATA.BATCH_SIZE * world_size
        self._logger = logger
        self._pending_losses: list[torch.Tensor] = []
        self._pending_norms: list[torch.Tensor] = []
        self._skipped = 0
        self._done = self._first = self._last_done = start
        self._start = self._last_time = time.perf_counter()
        if meters:
            vars(self.losses).update(meters['losses'])
            self.norms.load_state_dict(meters['norms'])
            self._skipped = meters['skipped']
        self._bar = tqdm(
            total=micro_batches, initial=start, desc=f'epoch {epoch}/{config.TRAIN.EPOCHS}',
            unit='batch', dynamic_ncols=True, leave=False, disable=not show_bar,
        )  # fmt: skip

    def step(
        self,
        loss: torch.Tensor,
        norm: torch.Tensor | None,
        lr: float,
        loss_scale: float,
        skipped: bool,
    ) -> None:
        """Takes one micro-batch's results, and writes a line where one is due.

        Args:
            loss: 0-dim, this rank's mean loss over the micro-batch, not divided for accumulation.
            norm: 0-dim gradient norm where the micro-batch completed an update, else None.
            lr: the learning rate that the next update will use.
            loss_scale: 1.0 without loss scaling.
            skipped: whether the update was skipped for a gradient that was not finite.
        """
        self._pending_losses.append(loss.detach())
        if norm is not None:
            self._pending_norms.append(norm.detach().clone())
        self._skipped += skipped
        index, self._done = self._done, self._done + 1
        self._bar.update()
        every = self._config.PRINT_FREQ
        if (every and index % every == 0) or self._done == self._micro_batches:
            self._read_pending()
            self._write_line(index, lr, loss_scale)

    def state_dict(self) -> dict[str, Any]:
        """The present meters as plain numbers; synchronizes with the device."""
        self._read_pending()
        losses = {key: float(value) for key, value in vars(self.losses).items()}
        return {'losses': losses, 'norms': self.norms.state_dict(), 'skipped': self._skipped}

    @property
    def images_per_second(self) -> float:
        """Images per second over all ranks, since the epoch began or was resumed."""
        return self._images_per_step * (self._done - self._first) / max(self.seconds, 1e-9)

    @property
    def seconds(self) -> float:
        """Seconds since the epoch began or was resumed."""
        return time.perf_counter() - self._start

    def close(self) -> None:
        """Removes the bar; call it on every path."""
        self._bar.close()

    def _read_pending(self) -> None:
        for loss in self._pending_losses:
            self.losses.update(loss.item())
        for norm in self._pending_norms:
            self.norms.update(norm.item())
        self._pending_losses.clear()
        self._pending_norms.clear()

    def _write_line(self, index: int, lr: float, loss_scale: float) -> None:
        now = time.perf_counter()
        seconds_per_step = (now - self._last_time) / (self._done - self._last_done)
        self._last_time, self._last_done = now, self._done
        epochs_left = self._config.TRAIN.EPOCHS - self._epoch - 1
        steps_left = epochs_left * self._micro_batches + self._micro_batches - self._done
        eta = timedelta(seconds=int(self.seconds / (self._done - self._first) * steps_left))
        skipped = f' skipped {self._skipped}' if self._skipped else ''
        self._logger.info(
            f'Train: [{self._epoch}/{self._config.TRAIN.EPOCHS}][{index}/{self._micro_batches}] '
            f'eta {eta} lr {lr:.3e} loss {self.losses.val:.4f} ({self.losses.avg:.4f}) '
            f'grad_norm {self.norms.val:.4f} ({self.norms.avg:.4f}/{self.norms.var:.4f}) '
            f'loss_scale {loss_scale:g}{skipped} '
            f'{self._images_per_step / seconds_per_step:.1f} img/s mem {memory_mib():.0f} MiB',
            extra=PROGRESS,
        )
        self._bar.set_postfix_str(f'loss {self.losses.avg:.4f} lr {lr:.2e}')


def memory_mib() -> float:
    """Peak memory in MiB: allocated on the GPU where there is one, else the process's own."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
