"""Settings of training that contradict each other, found before anything is built."""

from __future__ import annotations

from collections.abc import Iterator

from yacs.config import CfgNode

from internvl_ds.config.choices import require_one_of
from internvl_ds.config.ds.diagnostics import Diagnostic, diagnostic
from internvl_ds.errors import ConfigError
from internvl_ds.train.datasets.checks import reads_parts

_CHOICES = {'TRAIN.LOSS': ('', 'bce'), 'TRAIN.DIST_BN': ('', 'reduce', 'broadcast')}


def contradictions(config: CfgNode) -> Iterator[Diagnostic]:
    """The faults of TRAIN.LOSS, TRAIN.DIST_BN and DATA.REPEATED_AUG, with the keys at fault."""
    train, data = config.TRAIN, config.DATA
    for key, words in _CHOICES.items():
        try:
            require_one_of(key, train[key.removeprefix('TRAIN.')], words)
        except ConfigError as error:
            yield diagnostic('', str(error), yacs=key)
    threshold = train.BCE_TARGET_THRESH
    if threshold is not None and not (isinstance(threshold, int | float) and 0 <= threshold < 1):
        text = f'TRAIN.BCE_TARGET_THRESH is {threshold!r}; it takes a number from 0 to 1, or None'
        yield diagnostic('', text, yacs='TRAIN.BCE_TARGET_THRESH')
    for key, default in (('BCE_TARGET_THRESH', None), ('BCE_SUM', False)):
        if train.LOSS != 'bce' and train[key] != default:
            text = f"TRAIN.{key} {train[key]} is of TRAIN.LOSS 'bce', and that is {train.LOSS!r}"
            yield diagnostic('', f'{text}: set one of them otherwise', yacs=f'TRAIN.{key}')
    if data.REPEATED_AUG > 1 and reads_parts(config):
        which = 'DATA.IMG_ON_MEMORY True'
        if not data.IMG_ON_MEMORY:
            which = f"DATA.CACHE_MODE 'part' with DATA.ZIP_MODE {data.ZIP_MODE}"
        text = (
            f'DATA.REPEATED_AUG {data.REPEATED_AUG} has several ranks read an image, and {which} '
            'keeps it on one: set one of them otherwise'
        )
        yield diagnostic('', text, yacs='DATA.REPEATED_AUG')
