"""Exact accuracy over the validation images, and forward throughput."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from internvl_ds.dist.rendezvous import world_size
from internvl_ds.errors import ConfigError, RankError
from internvl_ds.pretrained.head import slice_22k_logits
from internvl_ds.train.data import EvalSampler
from internvl_ds.train.datasets.imagenet import Measure
from internvl_ds.train.datasets.opening import evaluates_22k_as_1k
from internvl_ds.train.datasets.precision import Ranking
from internvl_ds.train.model import input_dtype
from internvl_ds.train.prefetch import on_device

_WARMUP_PASSES = 10
_TIMED_PASSES = 30


@dataclass(frozen=True)
class EvalResult:
    """One evaluation, over all ranks.

    Attributes:
        acc1: top-1 accuracy, percent.
        acc5: top-5 accuracy, percent; over all classes where there are fewer than five.
        loss: mean cross-entropy per image, nats, without label smoothing; where a data set has
            other labels beside (ReaL), over the images' own.
        count: images evaluated: the data set's size.
        labelled: those of them that the accuracies are over: all, but for ReaL's without a label.
    """

    acc1: float
    acc5: float
    loss: float
    count: int
    labelled: int

    # What `acc1` is called in logs and in the keys of metrics.jsonl.
    name: ClassVar[str] = 'top-1'
    key: ClassVar[str] = 'acc1'

    def record(self) -> dict[str, float]:
        """For metrics.jsonl."""
        return {'acc1': self.acc1, 'acc5': self.acc5, 'val_loss': self.loss}

    def told(self) -> str:
        """For a line of the log."""
        return f'top-1 {self.acc1:.2f} % top-5 {self.acc5:.2f} % loss {self.loss:.4f}'


class MultiLabelResult(EvalResult):
    """An evaluation of images of several labels.

    acc1, which the best epoch is chosen by, and acc5 are both the mean average precision, percent;
    the loss is the mean binary cross-entropy over images and classes, nats.
    """

    name: ClassVar[str] = 'mAP'
    key: ClassVar[str] = 'mAP'

    def record(self) -> dict[str, float]:
        """As of `EvalResult`."""
        return {'mAP': self.acc1, 'val_loss': self.loss}

    def told(self) -> str:
        """As of `EvalResult`."""
        return f'mAP {self.acc1:.2f} % loss {self.loss:.4f}'


@torch.no_grad()
def evaluate(
    config: CfgNode,
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    after_batch: Callable[[], object] | None = None,
) -> EvalResult:
    """Evaluates a model on the whole data set. Collective: every rank calls it.

    Each image counts exactly once, whatever the number of ranks and the batch size; the result is
    the same on every rank.

    Args:
        config: EVAL_22K_TO_1K, MODEL.NUM_CLASSES and DATA.DATASET are read.
        model: an engine or a plain module; left in the training mode that it was in.
        loader: this rank's share, sampled by `EvalSampler`; or any loader in a world of one. The
            data set's `Measure` says which logits count, and which labels are right.
        device: where the model is.
        after_batch: called after each batch; may raise, on all ranks alike.

    Raises:
        RankError: when the ranks together did not count every image once.
        ConfigError: when no image has a label that counts.
    """
    sampler, dataset = loader.sampler, loader.dataset
    order = iter(sampler)
    valid_left = sampler.num_valid if isinstance(sampler, EvalSampler) else len(sampler)  # type: ignore[arg-type]
    as_1k = evaluates_22k_as_1k(config, _num_classes(dataset))
    measure = getattr(dataset, 'measure', None) or Measure()
    columns = None if measure.columns is None else measure.columns.to(device)
    dtype = input_dtype(model)
    total = len(dataset)  # type: ignore[arg-type]
    ranking = Ranking(total, order) if getattr(dataset, 'multi_label', False) else None
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        for images, labels in on_device(loader, device):
            logits = model(images.to(dtype)).float()
            if as_1k:
                logits = slice_22k_logits(logits)
            if columns is not None:
                logits = logits.index_select(-1, columns)
            # Only the tail of a rank's share is padding: the first valid_left images count.
            valid = min(len(labels), valid_left)
            valid_left -= valid
            if ranking is not None:
                ranking.add(logits, labels, valid)
                sums += _count_several(logits[:valid], labels[:valid])
            else:
                answers = measure.answers_of(itertools.islice(order, len(labels)), valid)
                sums += count_batch(logits[:valid], labels[:valid], answers)
            if after_batch is not None:
                after_batch()
    finally:
        model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return _result_of(config, sums, total, ranking)


def _result_of(
    config: CfgNode, sums: torch.Tensor, total: int, ranking: Ranking | None
) -> EvalResult:
    """The result of the sums over all ranks. Collective where images are ranked."""
    correct1, correct5, loss, count, labelled = sums.tolist()
    if count != total:
        raise RankError(
            f'the evaluation counted {count:.0f} images on {world_size()} ranks, and the data set '
            f'has {total}: every rank must evaluate its own share, once'
        )
    if ranking is not None:
        percent = 100 * ranking.mean_average_precision()
        return MultiLabelResult(percent, percent, loss / count, int(count), int(labelled))
    if not labelled:
        raise ConfigError(
            f'DATA.DATASET {config.DATA.DATASET!r}: none of the {total} images has a label that '
            'counts (DATA.REAL_LABELS)'
        )
    accuracies = 100 * correct1 / labelled, 100 * correct5 / labelled
    return EvalResult(*accuracies, loss / count, int(count), int(labelled))


def count_batch(
    logits: torch.Tensor, labels: torch.Tensor, answers: Sequence[Sequence[int]] | None = None
) -> torch.Tensor:
    """Sums one batch: (hits in the top 1, in the top 5, cross-entropy, images, labelled images).

    Args:
        logits: float32, (images, classes); there may be no images.
        labels: int64, (images,).
        answers: for each image the labels of which any is a hit; an image without one is not
            labelled. None: an image's own label.
    """
    top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    loss = F.cross_entropy(logits, labels, reduction='none')
    if answers is None:
        right, labelled = labels[:, None], torch.ones_like(labels)
    else:
        width = max([1, *map(len, answers)])
        rows = [[*labels_of, *[-1] * (width - len(labels_of))] for labels_of in answers]
        right = torch.tensor(rows, dtype=labels.dtype, device=labels.device).view(-1, width)
        labelled = right[:, 0] >= 0
    hits = (top[:, :, None] == right[:, None, :]).any(-1)
    counts = hits[:, 0], hits.any(-1), loss, torch.ones_like(labels), labelled
    return torch.stack([each.sum(dtype=torch.float64) for each in counts])


def _count_several(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As `count_batch`, without hits, and with binary cross-entropy as the loss."""
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction='none').mean(-1)
    none, each = torch.zeros_like(losses), torch.ones_like(losses)
    counts = none, none, losses, each, targets.any(-1)
    return torch.stack([values.sum(dtype=torch.float64) for values in counts])


def _num_classes(dataset: object) -> int:
    classes = getattr(dataset, 'classes', ())
    return getattr(dataset, 'num_classes', len(classes))


@torch.no_grad()
def measure_throughput(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """Times 30 forward passes over one batch, after 10 to warm up. Collective: every rank calls it.

    Returns:
        Images per second on this rank.
    """
    images = next(iter(loader))[0].to(device, input_dtype(model))
    model.eval()
    for _ in range(_WARMUP_PASSES):
        model(images)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(_TIMED_PASSES):
        model(images)
    _synchronize(device)
    return _TIMED_PASSES * len(images) / (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
