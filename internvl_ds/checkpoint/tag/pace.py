"""Writes of a background save at a limited rate, until somebody waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Pace:
    """The rate of one save's writes on this rank."""

    def __init__(self, rate: float) -> None:
        """Limits to ``rate`` bytes a second; 0 for no limit."""
        self._rate, self._free_at, self._lifted = rate, 0.0, threading.Event()

    def lift(self) -> None:
        """Ends the limit, for good; any thread may call it."""
        self._lifted.set()

    def wait(self, count: int) -> None:
        """After ``count`` bytes were written: waits until the next may be."""
        if self._rate and not self._lifted.is_set():
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + count / self._rate
            self._lifted.wait(self._free_at - now)


_pace: ContextVar[Pace | None] = ContextVar('pace', default=None)


@contextmanager
def paced(pace: Pace) -> Iterator[None]:
    """Files that this thread writes in the block keep to ``pace``."""
    token = _pace.set(pace)
    try:
        yield
    finally:
        _pace.reset(token)


def wait_after(count: int) -> None:
    """Waits as this thread's `Pace` says, after ``count`` bytes were written."""
    if (pace := _pace.get()) is not None:
        pace.wait(count)
