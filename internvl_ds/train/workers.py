"""Data loaders whose workers leave signals to their rank, and end with it."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing.process
import signal
from typing import Any

from torch.utils.data import DataLoader

from internvl_ds.dist.signals import SIGNALS

_PR_SET_PDEATHSIG = 1

# The processes that loaders of this module have started.
_started: list[multiprocessing.process.BaseProcess] = []
_exit_is_watched = False


class Loader(DataLoader):
    """torch's, for a rank that signals ask to save and stop: its workers read on meanwhile."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs['worker_init_fn'] = _begin
        super().__init__(*args, **kwargs)

    def __iter__(self) -> Any:
        """Starts the workers; in the thread that is to outlive them."""
        global _exit_is_watched
        # A worker begins with its rank's handlers, or with none: neither must run there.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _started[:] = [worker for worker in _started if worker.is_alive()]
        _started.extend(getattr(batches, '_workers', ()))
        if _started and not _exit_is_watched:
            # The interpreter's own way is SIGTERM, which they ignore, and to wait for ever.
            atexit.register(_kill)
            _exit_is_watched = True
        return batches


def _begin(worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    # Where the rank ends without its exit functions, the kernel ends this process.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _kill() -> None:
    # torch's handler would raise that a worker was killed, as if memory had run out.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in _started:
        worker.kill()
    for worker in _started:
        worker.join(1)
    signal.signal(signal.SIGCHLD, before)
