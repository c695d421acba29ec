"""Running statistics of a training loop."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np


class MyAverageMeter:
    """Mean and population standard deviation of the finite values among the last ``max_len``.

    Values that are nan or infinite (the norm of an overflow step, say) show in ``val`` and do
    not enter the window, so a single one cannot blind the statistics.

    Attributes:
        val: the last value given, finite or not; 0.0 before the first.
    """

    def __init__(self, max_len: int = -1) -> None:
        """Starts empty; the window holds ``max_len`` finite values, or all for 0 or less."""
        self.val = 0.0
        self._window: deque[float] = deque(maxlen=max_len if max_len > 0 else None)

    def update(self, val: float) -> None:
        """Takes one value: a number, or a tensor with one element."""
        self.val = float(val)
        if math.isfinite(self.val):
            self._window.append(self.val)

    def state_dict(self) -> dict[str, Any]:
        """The last value and the window, as plain numbers."""
        return {'val': self.val, 'window': list(self._window)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the result of `state_dict`."""
        self.val = state['val']
        self._window = deque(state['window'], maxlen=self._window.maxlen)

    @property
    def avg(self) -> float:
        """Mean of the window; 0.0 while it is empty."""
        return float(np.mean(self._window)) if self._window else 0.0

    @property
    def var(self) -> float:
        """Population *standard deviation* of the window (the name is historical); 0.0 if empty."""
        return float(np.std(self._window)) if self._window else 0.0
