"""Data loaders whose workers ignore a launcher's signals, and end with their rank."""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import multiprocessing.process
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from internvl_ds.dist.signals import SIGNALS
from internvl_ds.errors import DataError

_PR_SET_PDEATHSIG = 1
_TRIES = 3  # to start the workers of an epoch

_log = logging.getLogger(__name__)

# The processes that loaders of this module have started.
_started: list[multiprocessing.process.BaseProcess] = []
# The iterators of loaders that keep their workers.
_kept: weakref.WeakSet[Any] = weakref.WeakSet()


class Loader(DataLoader):
    """torch's DataLoader, whose workers keep reading when a signal asks their rank to stop.

    Workers that do not begin are started anew: Python 3.10 can lock a child out of the interpreter
    where it forks beside threads of C++. So are kept ones that do not begin another epoch. A batch
    that does not come is a `DataError`.
    """

    def __init__(self, *args: Any, limit: float, begin_within: float = 30, **kwargs: Any) -> None:
        """Takes what torch's takes; ``persistent_workers`` keeps the workers from epoch to epoch.

        Args:
            limit: seconds for a batch to come from the workers.
            begin_within: seconds for the workers of an epoch to begin.
        """
        self._begin_within = begin_within
        if kwargs['num_workers']:
            self._begun = torch.multiprocessing.Semaphore(0)
            kwargs.update(worker_init_fn=functools.partial(_begin, self._begun), timeout=limit)
        super().__init__(*args, **kwargs)

    def __iter__(self) -> Any:
        """Starts the workers; in the main thread.

        Raises:
            DataError: when they do not begin, in three tries.
        """
        if not self.num_workers:
            return super().__iter__()
        generator = self.generator or torch.default_generator
        state = generator.get_state()
        for _ in range(_TRIES):
            batches, begun = self._start() if self._iterator is None else self._go_on()
            if begun:
                return _Batches(batches, self.timeout)
            pids = ', '.join(str(worker.pid) for worker in batches._workers)
            late = (
                f'the workers of the data loader, processes {pids}, did not begin within '
                f'DATA.WORKER_TIMEOUT ({self._begin_within:g} s)'
            )
            _log.warning('%s: they are killed, and others started', late)
            _kill(batches._workers)
            batches._shutdown_workers()
            self._iterator = None
            generator.set_state(state)  # the order and the workers' seeds were drawn from it
        raise DataError(
            f'{late}, in {_TRIES} tries: where the machine is this busy, set it larger; with '
            'DATA.NUM_WORKERS 0 the rank reads itself'
        )

    def _start(self) -> tuple[Any, bool]:
        # A worker begins with its rank's handlers, or with none: neither must run there.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            batches: Any = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _started[:] = [worker for worker in _started if worker.is_alive()]
        _started.extend(batches._workers)
        # The interpreter's own way is SIGTERM, which they ignore, and to wait for ever; torch's is
        # to wait for kept ones too. What is registered last is called first.
        atexit.unregister(_end)
        atexit.register(_end)
        if self.persistent_workers:
            _kept.add(batches)
        end = time.monotonic() + self._begin_within
        left = (max(0, end - time.monotonic()) for _ in batches._workers)
        return batches, all(self._begun.acquire(timeout=seconds) for seconds in left)

    def _go_on(self) -> tuple[Any, bool]:
        """Has kept workers begin an epoch; what is left of another that was broken off is dropped.

        They are given no state: the sampler, which says what to read and with which seeds, is here.
        """
        batches: Any = self._iterator
        batches._timeout, limit = self._begin_within, batches._timeout
        try:
            batches._reset(self)
        except RuntimeError as error:
            if 'timed out' not in str(error):
                raise
            return batches, False
        finally:
            batches._timeout = limit
        return batches, True


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


def _begin(begun: Any, worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    # Where the rank ends without its exit functions, the kernel ends this process.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    begun.release()


def _end() -> None:
    _kill(_started)
    for batches in _kept:
        batches._shutdown = True  # torch would wait for workers, and for what dead ones have locked


def _kill(workers: Sequence[multiprocessing.process.BaseProcess]) -> None:
    # torch's handler would raise that a worker was killed, as if memory had run out; only the main
    # thread has handlers, and where another ends the process it stands in a collective.
    handles = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if handles else None
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(1)
    if handles:
        signal.signal(signal.SIGCHLD, before)
