"""Decides when skipped updates stop the run, and words the error."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from internvl_ds.errors import GradientOverflow, few
from internvl_ds.zero.loss_scale import LossScale

KEPT = 5  # updates whose numbers the error shows


@dataclass
class OverflowWatch:
    """Counts skipped updates, and keeps the last numbers as tensors, unread.

    Attributes:
        in_a_row: updates skipped since the last applied one.
    """

    in_a_row: int = 0
    _updates: deque[tuple[list[torch.Tensor], torch.Tensor, float]] = field(
        default_factory=lambda: deque(maxlen=KEPT)
    )

    def would_stop(self, scale: LossScale | None, limit: int) -> bool:
        """Whether a skipped update now would be the last.

        ``limit`` is of skipped updates in a row; 0 for none.
        """
        return (scale is not None and scale.exhausted) or 0 < limit <= self.in_a_row + 1

    def record(
        self, losses: list[torch.Tensor], norm: torch.Tensor, scale: float, skipped: bool
    ) -> None:
        """Records one update.

        Args:
            losses: 0-dim, this rank's, one a micro-batch, divided by the accumulation steps.
            norm: 0-dim.
            scale: the loss scale of the update.
            skipped: whether it was skipped.
        """
        self._updates.append((losses, norm, scale))
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def error(
        self,
        scale: LossScale | None,
        update: int,
        rank: int,
        parameters: Sequence[str],
        bad_loss: bool,
    ) -> GradientOverflow:
        """The error that stops the run; reads the numbers kept.

        Args:
            scale: the present one; None without.
            update: how many updates there have been, skipped ones included.
            rank: whose losses were recorded.
            parameters: names of those whose gradients are not finite on any rank.
            bad_loss: whether the loss is not finite on any rank.
        """
        losses = [math.fsum(float(loss) for loss in group) for group, _, _ in self._updates]
        norms = [float(norm) for _, norm, _ in self._updates]
        scales = [factor for _, _, factor in self._updates]
        why = f'{self.in_a_row} updates in a row were skipped (TRAIN.MAX_CONSECUTIVE_OVERFLOWS)'
        if scale is not None and scale.dynamic and scales[-1] <= scale.min_scale:
            why = f'the loss scale is at its minimum, {scale.min_scale:g} (/fp16/min_loss_scale)'
        return GradientOverflow(
            f'update {update}: the gradients are not finite, and {why}. The weights are those '
            f'before the skipped updates. Last losses of rank {rank}: {_numbers(losses)}; gradient '
            f'norms: {_numbers(norms)}; loss scales: {_numbers(scales)}. Parameters with '
            f'non-finite gradients: {few(parameters) or "none was seen"} ({len(parameters)} in '
            f'all). {_advice(bad_loss, scale)}',
            losses,
            norms,
            scales,
            parameters,
        )


def _numbers(values: Sequence[float]) -> str:
    return ', '.join(f'{value:.6g}' for value in values)


def _advice(bad_loss: bool, scale: LossScale | None) -> str:
    if bad_loss:
        return (
            'The loss itself is not finite on some rank, so no loss scale helps: look for a bad '
            'batch or target, lower TRAIN.BASE_LR, lengthen TRAIN.WARMUP_EPOCHS, or lower '
            'TRAIN.CLIP_GRAD, and resume from an earlier checkpoint.'
        )
    if scale is None:
        return (
            'The loss is finite on all ranks: look at the layers named for a division, a root or '
            'a logarithm near zero.'
        )
    if not scale.dynamic:
        return (
            f'The static loss scale {scale.scale:g} is too large: lower /fp16/loss_scale, or set '
            'it to 0 for a dynamic one.'
        )
    return (
        'The loss is finite on all ranks, and some layer leaves the range of float16 (65504): set '
        'AMP_TYPE bfloat16, which has the range of float32, or train the layers named in float32.'
    )
