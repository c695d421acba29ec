"""The training loss that TRAIN.LOSS names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from yacs.config import CfgNode


class _BinaryCrossEntropy(BinaryCrossEntropy):
    """timm's, for targets (images, classes) of any dtype beside labels (images,)."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(x, target.to(x.dtype) if target.shape == x.shape else target)


class _WeightedCrossEntropy(nn.Module):
    """Cross entropy in which each class counts by its weight, for labels and for shares of them.

    The mean is over images: not over their weights, as torch's, where what an image counts would
    depend on the others of its micro-batch.
    """

    weights: torch.Tensor

    def __init__(self, weights: torch.Tensor, smoothing: float) -> None:
        super().__init__()
        self.register_buffer('weights', weights)
        self._smoothing = smoothing

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(
            x, target, self.weights, reduction='none', label_smoothing=self._smoothing
        )
        return losses.mean()


def build_criterion(
    config: CfgNode, soft_targets: bool, weights: torch.Tensor | None = None
) -> nn.Module:
    """The training loss over float32 logits.

    Args:
        config: TRAIN.LOSS, and what belongs to it.
        soft_targets: whether mixup makes them.
        weights: of `class_weights`; None: each class counts as much.
    """
    train, smoothing = config.TRAIN, config.MODEL.LABEL_SMOOTHING
    if train.LOSS == 'bce':
        return _BinaryCrossEntropy(
            smoothing, target_threshold=train.BCE_TARGET_THRESH, sum_classes=train.BCE_SUM,
            pos_weight=weights,
        )  # fmt: skip
    if weights is not None:
        return _WeightedCrossEntropy(weights, 0 if soft_targets else smoothing)
    if soft_targets:  # they are smoothed already
        return SoftTargetCrossEntropy()
    if smoothing > 0:
        return LabelSmoothingCrossEntropy(smoothing)
    return nn.CrossEntropyLoss()
