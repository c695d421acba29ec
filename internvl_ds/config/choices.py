"""Settings that are one of a few words."""

from __future__ import annotations

from yacs.config import CfgNode

from internvl_ds.config.tree import checkpoint_option
from internvl_ds.errors import ConfigError

_FROZEN = ('keep', 'once', 'omit')


def frozen_of(config: CfgNode) -> str:
    """CHECKPOINT.FROZEN.

    Raises:
        ConfigError: when it is none of the words that it may be.
    """
    value = checkpoint_option(config, 'FROZEN')
    if value not in _FROZEN:
        raise ConfigError(f'CHECKPOINT.FROZEN is {value!r}; it can be {" or ".join(_FROZEN)}')
    return str(value)
