"""Data loaders whose workers leave signals to their rank, and end with it."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing.process
import signal
from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader

from internvl_ds.dist.signals import SIGNALS
from internvl_ds.errors import DataError

_PR_SET_PDEATHSIG = 1

# The processes that loaders of this module have started.
_started: list[multiprocessing.process.BaseProcess] = []
_exit_is_watched = False


class Loader(DataLoader):
    """torch's, for a rank that signals ask to save and stop: its workers read on meanwhile.

    A batch that does not come within the limit is a `DataError`. A worker may stand still before it
    has begun: Python before 3.12 can lock itself out where it forks beside threads of C++.
    """

    def __init__(self, *args: Any, limit: float, **kwargs: Any) -> None:
        """Takes what torch's takes.

        Args:
            limit: seconds for a batch to come from the workers.
        """
        if kwargs['num_workers']:
            kwargs.update(worker_init_fn=_begin, timeout=limit)
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
        return _Batches(batches, self.timeout) if self.num_workers else batches


class _Batches:
    """The batches of a loader with workers.

    Attributes:
        workers: its processes.
    """

    def __init__(self, batches: Any, limit: float) -> None:
        self.workers: Sequence[multiprocessing.process.BaseProcess] = batches._workers
        self._batches, self._limit = batches, limit

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Any:
        """The next batch.

        Raises:
            DataError: when it does not come within the limit.
        """
        try:
            return next(self._batches)
        except RuntimeError as error:
            if 'timed out' not in str(error):
                raise
            pids = ', '.join(str(worker.pid) for worker in self.workers)
            raise DataError(
                'no batch came from the workers of the data loader within COMM.TIMEOUT '
                f'({self._limit:g} s): one of the processes {pids} stands still, or the images '
                'cannot be read in that time'
            ) from error


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
