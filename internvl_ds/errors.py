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
