"""The exceptions of this package: one small family, each catchable by a built-in type too."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from typing import Any

# C0 and C1 controls, lone surrogates (bytes that are no UTF-8), and what turns or hides text.
_CONTROL = re.compile(
    '[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]'
)

_LONGEST = 10_000  # characters of an error


class InternvlDsError(Exception):
    """Base of every error that this package raises on purpose.

    Its text is `printable` and not endless: names of files, and what stood in them, are in it.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return printable(text if len(text) <= _LONGEST else f'{text[:_LONGEST]} ...')


class ConfigError(InternvlDsError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another; both places are named."""


class EngineNotFound(InternvlDsError, LookupError):
    """An object that belongs to no known DeepSpeed engine was passed where one is needed."""


class RankError(InternvlDsError, RuntimeError):
    """Ranks did not act alike: some are missing, or their arguments differ."""


class GradientOverflow(InternvlDsError, ArithmeticError):
    """Too many updates in a row were skipped for non-finite gradients.

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
    """A checkpoint could not be written, or is damaged."""


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given path."""


class CheckpointMismatch(CheckpointError, ValueError):
    """The checkpoint is whole, but made for another model, layout or optimizer."""


class PretrainedError(InternvlDsError, RuntimeError):
    """Pretrained weights could not be read or do not fit the model."""


class DataError(InternvlDsError, ValueError):
    """An image cannot be read or transformed; the message names its file."""


class Preempted(Exception):
    """Not an error: every rank is to save now, and to end."""


def few(values: Sequence[Any], most: int = 5) -> str:
    """The first few of many, for a message."""
    return ', '.join(map(str, values[:most])) + (', ...' if len(values) > most else '')


def printable(text: object) -> str:
    """``text`` with control characters escaped, but for line breaks and tabs."""
    return _CONTROL.sub(lambda m: m[0].encode('unicode_escape').decode(), str(text))


def shown(name: object) -> str:
    """A name for one line of a message: `printable`, without line breaks."""
    return printable(name).replace('\n', '\\n').replace('\t', '\\t')


def brief(value: Any) -> str:
    """The repr of a value from a file, a line at most, however large the value is."""
    return printable(_repr.repr(value))


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 120
