"""Exact accuracy over the validation images, and forward throughput."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from internvl_ds.dist.rendezvous import world_size
from internvl_ds.errors import RankError
from internvl_ds.pretrained.head import slice_22k_logits
from internvl_ds.train.data import EvalSampler, evaluates_22k_as_1k
from internvl_ds.train.model import input_dtype

_WARMUP_PASSES = 10
_TIMED_PASSES = 30


@dataclass(frozen=True)
class EvalResult:
    """One evaluation, over all ranks.

    Attributes:
        acc1: top-1 accuracy, percent.
        acc5: top-5 accuracy, percent; over all classes where there are fewer than five.
        loss: mean cross-entropy per image, nats, without label smoothing.
        count: images counted: the data set's size.
    """

    acc1: float
    acc5: float
    loss: float
    count: int


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
        loader: this rank's share, sampled by `EvalSampler`; or any loader in a world of one.
        device: where the model is.
        after_batch: called after each batch; may raise, on all ranks alike.

    Raises:
        RankError: when the ranks together did not count every image once.
    """
    sampler = loader.sampler
    valid_left = sampler.num_valid if isinstance(sampler, EvalSampler) else len(sampler)  # type: ignore[arg-type]
    as_1k = evaluates_22k_as_1k(config, len(getattr(loader.dataset, 'classes', ())))
    dtype = input_dtype(model)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        for images, labels in loader:
            images = images.to(device, dtype, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            logits = model(images).float()
            if as_1k:
                logits = slice_22k_logits(logits)
            # Only the tail of a rank's share is padding: the first valid_left images count.
            valid = min(len(labels), valid_left)
            valid_left -= valid
            sums += count_batch(logits[:valid], labels[:valid])
            if after_batch is not None:
                after_batch()
    finally:
        model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    correct1, correct5, loss, count = sums.tolist()
    total = len(loader.dataset)  # type: ignore[arg-type]
    if count != total:
        raise RankError(
            f'the evaluation counted {count:.0f} images on {world_size()} ranks, and the data set '
            f'has {total}: every rank must evaluate its own share, once'
        )
    return EvalResult(100 * correct1 / count, 100 * correct5 / count, loss / count, int(count))


def count_batch(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums one batch: (correct in the top 1, correct in the top 5, cross-entropy, images).

    Args:
        logits: float32, (images, classes); there may be no images.
        labels: int64, (images,).
    """
    top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    hits = top == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction='none')
    counts = hits[:, 0], hits, loss, torch.ones_like(labels)
    return torch.stack([each.sum(dtype=torch.float64) for each in counts])


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
