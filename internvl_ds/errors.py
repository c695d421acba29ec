"""The exceptions of this package: one small family, each catchable by a built-in type too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class InternvlDsError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(InternvlDsError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another; both places are named."""


class EngineNotFound(InternvlDsError, LookupError):
    """An object that belongs to no known DeepSpeed engine was passed where one is needed."""


class RankError(InternvlDsError, RuntimeError):
    """Ranks did not act alike: some did not come, or they came with different arguments."""


class GradientOverflow(InternvlDsError, ArithmeticError):
    """Update after update was skipped for non-finite gradients, and no more would help.

    Attributes:
        losses: this rank's last ones, one an update: the sum over its micro-batches.
        norms: the last global gradient norms, unscaled.
        scales: the loss scales that these updates ran with; all 1.0 without one.
        parameters: names of those whose gradients are not finite on any rank.
    """

    def __init__(
        self,
        message: str,
        losses: Sequence[float],
        norms: Sequence[float],
        scales: Sequence[float],
        parameters: Sequence[str],
    ) -> None:
        super().__init__(message)
        self.losses = list(losses)
        self.norms = list(norms)
        self.scales = list(scales)
        self.parameters = list(parameters)


class CheckpointError(InternvlDsError, RuntimeError):
    """A checkpoint could not be written, or could not be read as what it claims to be."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path that was asked for."""


class CheckpointMismatch(CheckpointError, ValueError):
    """The checkpoint is whole, but made for another model, layout or optimizer."""


class PretrainedError(InternvlDsError, RuntimeError):
    """Pretrained weights could not be read or do not fit the model."""


def few(values: Sequence[Any], most: int = 5) -> str:
    """The first few of many, for a message."""
    return ', '.join(map(str, values[:most])) + (', ...' if len(values) > most else '')
