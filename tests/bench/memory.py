"""How much memory of its own a call needs at its worst: not counted is what it maps of files."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

_PAGE = os.sysconf('SC_PAGE_SIZE')
# Seconds after which a thread that runs Python code lets another one run.
_SWITCH_INTERVAL = 1e-4


def anonymous() -> int:
    """Bytes of this process that no file backs (RssAnon): resident, less those of files."""
    resident, shared = Path('/proc/self/statm').read_bytes().split()[1:3]
    return (int(resident) - int(shared)) * _PAGE


def settled() -> int:
    """``anonymous`` after what no one uses any more has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would hide what is asked for
    return anonymous()


def peak_growth(action: Callable[[], object], interval: float = 0.0005) -> int:
    """Bytes by which the anonymous memory exceeded, while ``action`` ran, what it was before.

    A thread looks every so often; it disturbs the action's time, and may miss what is there for a
    few milliseconds only.

    Args:
        action: what to run.
        interval: seconds between two looks.
    """
    before = settled()
    done = threading.Event()
    peak = [before]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(interval)

    thread = threading.Thread(target=watch, daemon=True)
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    thread.start()
    try:
        action()
    finally:
        peak[0] = max(peak[0], anonymous())
        done.set()
        thread.join()
        sys.setswitchinterval(switch_interval)
    return peak[0] - before
