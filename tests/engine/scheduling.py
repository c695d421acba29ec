"""What ranks do in test_scheduling.py, and the plain loop beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_checkpoint,
    save_checkpoint,
)
from internvl_ds.checkpoint.formats.export import write_original
from internvl_ds.dist.rendezvous import rank, world_size
from tests.engine.stepping import masters
from tests.harness.calls import message_of
from tests.harness.model import make_config, make_model, make_sgd, micro_batch, zero_json

logger = logging.getLogger('test')
EPOCHS, BATCHES, GROUP, SKIPPED = 3, 10, 4, 3  # the third boundary's update is skipped


def make_scheduler(kind: str, optimizer: Any, length: int) -> Any:
    """timm's with a warm-up, or torch's, over so many micro-batches."""
    if kind == 'timm':
        return CosineLRScheduler(
            optimizer, t_initial=length, lr_min=1e-3, warmup_t=7, warmup_lr_init=1e-3,
            t_in_epochs=False,
        )  # fmt: skip
    return CosineAnnealingLR(optimizer, length)


def is_boundary(index: int, short: bool, batches: int = BATCHES, group: int = GROUP) -> bool:
    """Whether a micro-batch ends an update; with ``short`` an epoch's last always does."""
    return (index + 1) % group == 0 or (short and index + 1 == batches)


def plain_lrs(kind: str, short: bool) -> list[float]:
    """The lr after each boundary of a plain loop that moves the schedule by micro-batches."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make_scheduler(kind, optimizer, EPOCHS * BATCHES)
    lrs, come, stepped = [], 0, 0
    for epoch in range(EPOCHS):
        for index in range(BATCHES):
            come = epoch * BATCHES + index + 1
            if not is_boundary(index, short):
                continue
            if len(lrs) + 1 != SKIPPED:
                optimizer.step()
                if kind == 'timm':
                    scheduler.step_update(come)
                for _ in range(come - stepped if kind == 'torch' else 0):
                    scheduler.step()
                stepped = come
            lrs.append(optimizer.param_groups[0]['lr'])
    return lrs


class Run:
    """An engine with a schedule, and the original's loop over it."""

    def __init__(
        self, stage: int, kind: str = 'timm', schedule_in: str | None = 'micro-batches',
        group: int = GROUP, given: bool = True, output: str = '',
    ) -> None:  # fmt: skip
        self.group, self.batches = group, BATCHES * group // GROUP
        self.config = make_config(
            output, DATA__BATCH_SIZE=16 // group // world_size(), TRAIN__EPOCHS=EPOCHS,
            TRAIN__ACCUMULATION_STEPS=group, SAVE_CKPT_NUM=0,
        )  # fmt: skip
        model = make_model()
        client = make_sgd(model)
        if given:
            self.scheduler = make_scheduler(kind, client, EPOCHS * self.batches)
        self.engine, self.optimizer = initialize(
            self.config, model, client, zero_json(stage),
            **({'lr_scheduler': self.scheduler, 'schedule_in': schedule_in} if given else {}),
        )  # fmt: skip
        if not given:
            self.scheduler = make_scheduler(kind, client, EPOCHS * self.batches)
        self.scaler = NativeScalerWithGradNormCount()
        self.boundaries = 0

    def lr(self) -> float:
        return self.optimizer.param_groups[0]['lr']

    def epoch(self, epoch: int, short: bool, own: bool = False) -> list[float]:
        """One epoch; returns the lr after each boundary.

        Args:
            own: whether the loop steps the scheduler as the original does.
        """
        lrs = []
        self.optimizer.zero_grad()
        for index in range(self.batches):
            x, y = micro_batch(epoch, index % self.group, self.group, rank(), world_size())
            loss = nn.functional.cross_entropy(self.engine(x), y) / self.group
            boundary = is_boundary(index, short, self.batches, self.group)
            if boundary and self.boundaries + 1 == SKIPPED and rank() == 0:
                loss = loss * float('nan')
            self.scaler(loss, self.optimizer, 1.0, update_grad=boundary)
            if boundary:
                self.boundaries += 1
                if own and hasattr(self.scheduler, 'step_update'):
                    self.scheduler.step_update(epoch * self.batches + index)
                elif own:
                    self.scheduler.step()
                lrs.append(self.lr())
        return lrs

    def save(self, epoch: int) -> str:
        return save_checkpoint(
            self.config, epoch, self.engine, 0.0, self.optimizer, self.scheduler, self.scaler,
            logger,
        )  # fmt: skip

    def load(self, resume: str, scheduler: Any) -> None:
        self.config.defrost()
        self.config.MODEL.RESUME = resume
        load_checkpoint(self.config, self.engine, self.optimizer, scheduler, self.scaler, logger)
        self.boundaries = SKIPPED  # none is skipped again


@contextmanager
def caught_warnings() -> Iterator[list[str]]:
    """What is warned of through the script's logger and this package's meanwhile."""
    caught: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: caught.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logger, logging.getLogger('internvl_ds')]
    for each in loggers:
        each.addHandler(handler)
    try:
        yield caught
    finally:
        for each in loggers:
            each.removeHandler(handler)


def follow(cells: list[tuple[int, str, bool]]) -> list[list[float]]:
    """The lr after each boundary, in each (stage, kind of scheduler, short last group)."""
    found = []
    for stage, kind, short in cells:
        run = Run(stage, kind)
        found.append([lr for epoch in range(EPOCHS) for lr in run.epoch(epoch, short)])
        run.engine.destroy()
    return found


def save(root: str, stage: int, kind: str, schedule_in: str | None) -> str:
    """Trains the first two epochs and saves; also as an original's file beside the tag."""
    run = Run(stage, kind, schedule_in, output=f'{root}/{stage}{kind}')
    for epoch in range(2):
        run.epoch(epoch, short=False)
    tag = run.save(1)
    if rank() == 0:
        write_original(Path(tag), Path(f'{tag}.pth'))
    torch.distributed.barrier()
    run.engine.destroy()
    return tag


def resume(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The third epoch from a tag: the lr before its first update, and after each boundary."""
    found = []
    for cell in cells:
        with caught_warnings() as warned:
            run = Run(cell['stage'], cell['kind'], cell['schedule_in'], cell['group'])
            run.load(cell['tag'], run.scheduler if cell['restored'] else None)
            before = run.lr()
            found.append({'before': before, 'lrs': run.epoch(2, short=False), 'warned': warned})
        run.engine.destroy()
    return found


def step_too(stages: list[int]) -> dict[str, Any]:
    """A loop that steps the scheduler that the engine steps."""
    found = {}
    for stage in stages:
        for kind in ('timm', 'torch'):
            run = Run(stage, kind)
            start = masters(run.engine)
            said = message_of(lambda r=run: r.epoch(0, False, own=True))
            once = masters(run.engine)
            again = message_of(lambda r=run: r.epoch(0, False))
            found[f'{stage} {kind}'] = [
                said, once != start, again == said, masters(run.engine) == once,
                run.engine.global_steps,
            ]  # fmt: skip
            run.engine.destroy()
    return found


def warn(root: str) -> dict[str, list[str]]:
    """What is said of a schedule whose unit nobody has told, at the start and at a save."""
    found = {}
    for name, schedule_in, group, length in (
        ('unclear', None, GROUP, BATCHES), ('told', 'updates', GROUP, BATCHES),
        ('micro-batches', 'micro-batches', GROUP, BATCHES), ('no accumulation', None, 1, BATCHES),
        ('of updates', None, GROUP, BATCHES // GROUP),
    ):  # fmt: skip
        with caught_warnings() as warned:
            run = Run(1, 'timm', schedule_in, group, output=f'{root}/{name}')
            run.scheduler.t_initial = EPOCHS * length
            run.epoch(0, short=False)
            run.optimizer.zero_grad()
            run.save(0)
        found[name] = [w for w in warned if 'schedule' in w]
        run.engine.destroy()
    return found


def own_schedule(root: str) -> list[float]:
    """A schedule that the script steps by itself, into another stage: the lr before and after."""
    run = Run(1, given=False, output=f'{root}/own')
    for epoch in range(2):
        run.epoch(epoch, short=False, own=True)
    tag, before = run.save(1), run.lr()
    run.engine.destroy()
    if rank() == 0:
        write_original(Path(tag), Path(f'{tag}.pth'))
    torch.distributed.barrier()
    lrs = [before]
    for path in (tag, f'{tag}.pth'):
        other = Run(2, given=False)
        other.load(path, other.scheduler)
        lrs.append(other.lr())
        other.engine.destroy()
    return lrs
