"""Notices signals at once, also while the main thread is in C code."""

from __future__ import annotations

import contextlib
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

# The exit status of a process that SIGINT ended at once: what shells say of one that died of it.
INTERRUPTED = 128 + signal.SIGINT

# A shell that starts a process in the background, and nohup, ignore these: they stay ignored.
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)

# Seconds after a request within which a further signal belongs to it: a terminal signals ranks
# that their launcher signals too.
_SAME_REQUEST = 1.0


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
    """Whether a signal has asked this process to stop; SIGINT after that ends it at once."""

    def __init__(self) -> None:
        """Takes over the signals of `SIGNALS`."""
        self.signal: signal.Signals | None = None
        self._since: float | None = None
        super().__init__(SIGNALS, self._note, self._handle)

    def know(self) -> None:
        """Records that another rank, or the launch script, got the signal."""
        if self._since is None:
            self._since = time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)

    def _note(self, number: int) -> None:
        if self._since is None or time.monotonic() - self._since < _SAME_REQUEST:
            self._handle(number, None)
            self.know()
        elif number == signal.SIGINT or self._is_torchruns_second(number):
            end_at_once('a second signal')

    def _is_torchruns_second(self, number: int) -> bool:
        """torchrun hands the first Ctrl-C on as SIGINT, and the second as SIGTERM."""
        first = self.signal == signal.SIGINT and 'TORCHELASTIC_RUN_ID' in os.environ
        return first and number == signal.SIGTERM


def end_at_interrupt() -> None:
    """Makes SIGINT end this process at once, with one line and no traceback."""
    Listener([signal.SIGINT], lambda number: end_at_once('SIGINT'))


def end_at_once(why: str) -> None:
    """Ends this process where it is; rank 0 says so. Any thread may call it."""
    rank = 0
    with contextlib.suppress(ConfigError):  # which the main thread is about to tell
        rank = detect(os.environ).rank
    if rank == 0:
        line = f'rank 0 on {socket.gethostname()} ends the job at once: {why}\n'
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, line.encode())  # print may wait for a lock of the main thread
    os._exit(INTERRUPTED)
