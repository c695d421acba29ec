"""TRAIN.SAVE_OVERHEAD: how often to save inside an epoch, from what saves are measured to cost.

After CheckFreq (Mohan and others, FAST 2021), which tunes its interval to a share of the time too.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque

_FIRST = 20  # updates before the first save, whose time is the measure of the others
_WINDOW = 100  # updates whose median is the time of one without a save
_NEWS = 1.25  # the factor by which an interval has to change to be told again


class SaveInterval:
    """Seconds from one save to the next, so that saves take a given share of the time.

    A save costs what the updates beside it take longer than others: those that wait for it, and
    those that compute while it is written.
    """

    def __init__(self, share: float, logger: logging.Logger) -> None:
        """Measures from now on.

        Args:
            share: TRAIN.SAVE_OVERHEAD, of the time of training, above 0.
            logger: told the interval.
        """
        self._seconds: float | None = None
        self._share, self._logger = share, logger
        self._alone: deque[float] = deque(maxlen=_WINDOW)
        self._beside: list[float] = []
        self._told = 0.0
        self.start()

    @property
    def seconds(self) -> float | None:
        """The interval; None where no save is due, as while one is being measured."""
        return None if self._beside else self._seconds

    def start(self) -> None:
        """The first of several updates begins: after an evaluation, or something else."""
        self._last = time.perf_counter()
        # A save that began before, and is being written still, is not measured.
        self._from_its_begin = False
        self._beside.clear()

    def lap(self, saves: bool) -> None:
        """An update has ended, with what the loop did after it.

        Args:
            saves: whether a save was made in it, or was being written.
        """
        now = time.perf_counter()
        taken, self._last = now - self._last, now
        if saves:
            self._beside.append(taken)
            return
        if self._beside and self._alone and self._from_its_begin:
            self._measure()
        self._beside.clear()
        self._from_its_begin = True
        self._alone.append(taken)
        if self._seconds is None and len(self._alone) == _FIRST:
            self._seconds = 0.0

    def _measure(self) -> None:
        """A save has been written: its cost is the next interval's."""
        update = statistics.median(self._alone)
        cost = max(sum(self._beside) - len(self._beside) * update, 0.0)
        # Never in each update: what it costs beside others could not be told any more.
        self._seconds = max(cost / self._share, _FIRST * update)
        if not self._told / _NEWS < self._seconds < self._told * _NEWS:
            self._told = self._seconds
            self._logger.info(
                f'a save costs {cost:.3g} s of training, an update takes {update:.3g} s: one every '
                f'{self._seconds:.3g} s ({self._seconds / update:.0f} updates) for '
                f'TRAIN.SAVE_OVERHEAD {self._share:g}'
            )
