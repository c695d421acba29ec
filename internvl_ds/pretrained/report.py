"""The report of load_pretrained, for code and for the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from internvl_ds.errors import PretrainedError, few
from internvl_ds.pretrained.transforms import Note


@dataclass(frozen=True)
class PretrainedReport:
    """What was loaded from where, and what one side lacks.

    Attributes:
        path: MODEL.PRETRAINED.
        notes: what each step did that did something, in order.
        loaded: keys of the model's state dict that were written.
        missing: keys of the model that the checkpoint lacks; they stay as they were.
        unexpected: keys of the checkpoint, after the steps, that the model lacks.
        matched: share of the model's parameter tensors that were written, 0 to 1; a head that was
            left out on purpose is not counted.
    """

    path: str
    notes: tuple[Note, ...]
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    matched: float

    def log(self, logger: logging.Logger) -> None:
        """Logs the notes, counts and the first few names; the full lists at DEBUG."""
        logger.info('pretrained weights: %s', self.path)
        for note in self.notes:
            (logger.warning if note.is_warning else logger.info)(note.text)
        logger.info(
            'loaded %d entries, %.0f %% of the parameters', len(self.loaded), 100 * self.matched
        )
        for title, names in (
            ('missing from the checkpoint, left as they are in the model', self.missing),
            ('unexpected, not in the model', self.unexpected),
        ):
            if names:
                logger.warning('%d entries %s: %s', len(names), title, _few(names))
                logger.debug('%s: %s', title, ', '.join(names))

    def require(self, least: float) -> None:
        """Refuses weights of which less than ``least``, MODEL.PRETRAINED_MIN_MATCH, fits: that
        run would start from scratch, unnoticed.
        """
        if self.matched >= least:
            return
        raise PretrainedError(
            f"only {100 * self.matched:.0f} % of the model's parameters are in the checkpoint, and "
            f'MODEL.PRETRAINED_MIN_MATCH is {100 * least:.0f} %. The checkpoint lacks '
            f'{_few(self.missing)}; the model lacks {_few(self.unexpected) or "nothing"}. Set '
            'MODEL.PRETRAINED_RENAME to the names that the model has, or lower the limit'
        )


def _few(names: Sequence[str], most: int = 5) -> str:
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return few(names[:most]) + more
