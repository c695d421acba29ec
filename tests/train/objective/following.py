"""What ranks do in the tests of the training loss: an epoch of the program, and of a plain loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.task import LogitDistillationTask
from torch import nn

from internvl_ds.dist.rendezvous import world_size
from internvl_ds.engine.epochs import seed_everything
from internvl_ds.train.data import build_loaders, start_epoch
from internvl_ds.train.loop import train_one_epoch
from internvl_ds.train.model import build_model
from internvl_ds.train.optim import build_optimizer, build_scheduler, scaled_lrs
from internvl_ds.train.setup import setup
from tests.harness.training import small_config, whole_weights


class MultiHot:
    """A data set in which each image is of two classes."""

    def __init__(self, images: Any) -> None:
        self.images, self.source = images, images.source

    def __getitem__(self, index: int) -> tuple[Any, torch.Tensor]:
        image, label = self.images[index]
        target = torch.zeros(3)
        target[[label, (label + 1) % 3]] = 1.0
        return image, target

    def __len__(self) -> int:
        return len(self.images)


def _loaders(config: Any, rank: int, multi_hot: bool) -> Any:
    loaders = build_loaders(config, rank, world_size())
    if multi_hot:
        loaders.train.dataset.images = MultiHot(loaders.train.dataset.images)
    return loaders


def _batches(config: Any, rank: int, multi_hot: bool) -> Iterator[tuple[torch.Tensor, ...]]:
    loaders = _loaders(config, rank, multi_hot)
    start_epoch(loaders.train, config.SEED, 0, rank)
    for images, labels in loaders.train:
        yield loaders.mixup(images, labels) if loaders.mixup else (images, labels)


def _plain_loss(
    config: Any, model: nn.Module, bce: dict[str, Any] | None, weights: list[float] | None
) -> Any:
    """What a plain loop computes of images and targets, of timm's and torch's own parts."""
    if weights is not None:
        smoothing = 0.0 if config.AUG.MIXUP else config.MODEL.LABEL_SMOOTHING
        weighted = nn.CrossEntropyLoss(
            torch.tensor(weights), reduction='sum', label_smoothing=smoothing
        )
        return lambda images, targets: weighted(model(images), targets) / len(images)
    if bce is not None:
        criterion = BinaryCrossEntropy(**bce)
        return lambda images, targets: criterion(model(images), targets)
    settings, criterion = config.TRAIN.DISTILL, LabelSmoothingCrossEntropy(0.1)
    teacher = timm.create_model(settings.TEACHER, num_classes=3)
    teacher.load_state_dict(torch.load(settings.PRETRAINED))
    task = LogitDistillationTask(
        model, teacher, criterion, task_loss_weight=1 - settings.ALPHA,
        temperature=settings.TEMPERATURE, verbose=False,
    )  # fmt: skip
    if settings.TYPE == 'soft':
        return lambda images, targets: task(images, targets)['loss']

    def hard(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(images)
        seen = task.teacher.normalize_input(images, task.student_mean, task.student_std)
        part = nn.functional.cross_entropy(logits, teacher(seen).argmax(-1))
        loss: torch.Tensor = (1 - settings.ALPHA) * criterion(logits, targets)
        return loss + settings.ALPHA * part

    return hard


def follow_plain_loop(
    data: str,
    output: str,
    stage: int,
    opts: dict[str, Any],
    bce: dict[str, Any] | None = None,
    multi_hot: bool = False,
    weights: list[float] | None = None,
) -> dict[str, Any]:
    """One epoch with ``opts``, and of a plain loop with timm's own loss, made of ``bce``.

    Without ``bce`` the loop has torch's cross entropy with ``weights`` of classes, and without
    these it distils as timm's task does.
    """
    config = small_config(
        Path(data), OUTPUT=output, DATA__BATCH_SIZE=2, TRAIN__OPTIMIZER__NAME='sgd',
        TRAIN__BASE_LR=1.0, TRAIN__EPOCHS=1, TRAIN__WARMUP_EPOCHS=0, MODEL__DROP_PATH_RATE=0.0,
        TRAIN__AUTO_RESUME=False, **opts,
    )  # fmt: skip
    state = setup(config, {'zero_optimization': {'stage': stage}}, logging.getLogger('test'))
    if multi_hot:
        assert state.loaders.train is not None
        dataset: Any = state.loaders.train.dataset
        dataset.images = MultiHot(dataset.images)
    start = {name: p.clone() for name, p in whole_weights(state.engine).items()}
    record = train_one_epoch(state, 0)

    seed_everything(config.SEED)
    model = build_model(config)
    loss_of = _plain_loss(config, model, bce, weights)
    model.train()
    lrs = scaled_lrs(config, world_size())
    optimizer = build_optimizer(config, model, lrs.base)
    scheduler = build_scheduler(config, optimizer, 7, lrs)
    shares = [list(_batches(config, other, multi_hot)) for other in range(world_size())]
    losses = []
    for index, of_ranks in enumerate(zip(*shares, strict=True)):
        parts = [loss_of(images, targets) for images, targets in of_ranks]
        losses.append(sum(part.item() for part in parts) / len(parts))
        (sum(parts) / len(parts)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.TRAIN.CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_update(index)
    got, expected = whole_weights(state.engine), dict(model.named_parameters())
    return {
        'moved': max((expected[n] - start[n]).abs().max().item() for n in start),
        'differs': max((expected[n] - got[n]).abs().max().item() for n in start),
        'loss': [record['train_loss'], sum(losses) / len(losses)],
        'updates': len(losses),
    }


def require_same_epoch(result: dict[str, Any]) -> None:
    """What a rank's `follow_plain_loop` found: 7 updates that moved the weights as plain ones."""
    assert result['updates'] == 7
    assert result['moved'] > 1e-3
    assert result['differs'] < 1e-6
    assert result['loss'][0] == pytest.approx(result['loss'][1], rel=1e-5)
