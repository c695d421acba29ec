"""Notices signals at once, also while the main thread is in C code."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from internvl_ds.dist.launchers import detect
from internvl_ds.errors import ConfigError
from internvl_ds.files import forks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

# The exit statuses of a process that a signal ended at once, as shells tell them.
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM

# A shell that starts a process in the background, and nohup, ignore these: they stay ignored.
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)

# Seconds after a request within which a further signal belongs to it: a terminal signals ranks
# that their launcher signals too.
_SAME_REQUEST = 1.0
# Seconds for the main thread to notice a signal: longer than an update, or a call of a save, takes.
_STANDS = 10.0


class Listener:
    """Takes over signals, and passes their numbers to a thread at once.

    Python runs handlers in the main thread, between two of its instructions: never while it waits
    for other ranks or for the device.
    """

    def __init__(
        self,
        numbers: Sequence[signal.Signals],
        hear: Callable[[int], None],
        handle: Callable[[int, FrameType | None], None] = lambda number, frame: None,
    ) -> None:
        """Takes the signals over; only the main thread may.

        Args:
            numbers: of these, SIGINT and SIGHUP stay ignored where they are.
            hear: called with each signal's number, in a thread, at once.
            handle: called with the number as well, in the main thread, when Python gets there.
        """
        self._hear = hear
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        handlers = {number: signal.getsignal(number) for number in numbers}
        ignored = {n for n in _MAY_BE_IGNORED if handlers.get(n) is signal.SIG_IGN}
        self._before = {n: handler for n, handler in handlers.items() if n not in ignored}
        # A child's signals are not its parent's: the same socket would report them.
        forks.at_fork(self, self._restore)
        self._fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in self._before:
            signal.signal(number, handle)
        self._thread = threading.Thread(target=self._listen, name='signals', daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Restores the previous signal handlers; safe to call twice."""
        if not forks.forget(self):
            return
        self._restore()
        self._writer.send(b'\0')
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._fd)

    def _listen(self) -> None:
        while number := self._reader.recv(1)[0]:
            if number in self._before:
                self._hear(number)


class Request(Listener):
    """Whether a signal has asked this process to stop; SIGINT after that ends it at once.

    So does SIGTERM where the main thread has not seen the first signal for 10 seconds: it stands in
    C code, as in a collective of NCCL that does not end. Else SIGTERM does not, for schedulers and
    launchers send it twice, and the save that it asked for would be lost.
    """

    def __init__(self) -> None:
        """Takes over the signals of `SIGNALS`."""
        self.signal: signal.Signals | None = None
        self._since: float | None = None
        self._unseen: float | None = None  # since when the main thread has not seen a signal
        super().__init__(SIGNALS, self._note, self._handle)

    def know(self) -> None:
        """Records that another rank, or the launch script, got the signal."""
        if self._since is None:
            self._since = time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._unseen = math.inf
        self._take(number)

    def _take(self, number: int) -> None:
        self.signal = self.signal or signal.Signals(number)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self._unseen is None:
            self._unseen = now
        if self._since is None or now - self._since < _SAME_REQUEST:
            self._take(number)
            self.know()
        elif number == signal.SIGINT or self._is_torchruns_second(number):
            end_at_once('a second signal')
        elif number == signal.SIGTERM and now - self._unseen >= _STANDS:
            end_at_once('a second SIGTERM; the main thread stands in C code', TERMINATED)

    def _is_torchruns_second(self, number: int) -> bool:
        """torchrun hands the first Ctrl-C on as SIGINT, and the second as SIGTERM."""
        first = self.signal == signal.SIGINT and 'TORCHELASTIC_RUN_ID' in os.environ
        return first and number == signal.SIGTERM


def end_at_interrupt() -> None:
    """Makes SIGINT end this process at once, with one line and no traceback."""
    Listener([signal.SIGINT], lambda number: end_at_once('SIGINT'))


def end_at_once(why: str, status: int = INTERRUPTED) -> None:
    """Ends this process where it is; rank 0 says so of SIGINT. Any thread may call it.

    Args:
        why: for the line.
        status: `INTERRUPTED`, by a terminal that all ranks share, or `TERMINATED`.
    """
    rank = 0
    with contextlib.suppress(ConfigError):  # which the main thread is about to tell
        rank = detect(os.environ).rank
    if rank == 0 or status == TERMINATED:
        line = f'rank {rank} on {socket.gethostname()} ends the job at once: {why}\n'
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, line.encode())  # print may wait for a lock of the main thread
    os._exit(status)
