"""Settings that take one of a few words."""

from __future__ import annotations

from collections.abc import Sequence

from yacs.config import CfgNode

from internvl_ds.config.tree import checkpoint_option
from internvl_ds.errors import ConfigError

_ASYNC_COPY = ('auto', 'overlap', 'at once')
_FROZEN = ('auto', 'keep', 'once', 'omit')


def require_one_of(key: str, value: object, words: Sequence[str]) -> None:
    """Raises ConfigError if the value of a key is none of its allowed words."""
    if value not in words:
        raise ConfigError(f'{key} is {value!r}; it can be {", ".join(map(repr, words))}')


def copies_later(config: CfgNode) -> bool:
    """Whether CHECKPOINT.ASYNC_COPY is 'overlap'; ConfigError as `require_one_of`.

    'auto' is not: a script may write to weights in ways that nothing notices. The training program
    puts 'overlap' in its place.
    """
    value = checkpoint_option(config, 'ASYNC_COPY')
    require_one_of('CHECKPOINT.ASYNC_COPY', value, _ASYNC_COPY)
    return value == 'overlap'


def frozen_of(config: CfgNode) -> str:
    """CHECKPOINT.FROZEN; ConfigError as `require_one_of`."""
    value = checkpoint_option(config, 'FROZEN')
    require_one_of('CHECKPOINT.FROZEN', value, _FROZEN)
    return str(value)
