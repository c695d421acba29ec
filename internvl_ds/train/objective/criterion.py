"""The training loss that TRAIN.LOSS names."""

from __future__ import annotations

import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from yacs.config import CfgNode


class _BinaryCrossEntropy(BinaryCrossEntropy):
    """timm's, for targets (images, classes) of any dtype beside labels (images,)."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(x, target.to(x.dtype) if target.shape == x.shape else target)


def build_criterion(config: CfgNode, soft_targets: bool) -> nn.Module:
    """The training loss over float32 logits: soft targets where mixup makes them."""
    train, smoothing = config.TRAIN, config.MODEL.LABEL_SMOOTHING
    if train.LOSS == 'bce':
        return _BinaryCrossEntropy(
            smoothing, target_threshold=train.BCE_TARGET_THRESH, sum_classes=train.BCE_SUM
        )
    if soft_targets:  # they are smoothed already
        return SoftTargetCrossEntropy()
    if smoothing > 0:
        return LabelSmoothingCrossEntropy(smoothing)
    return nn.CrossEntropyLoss()
