"""A connection to the process group's store in which every call has a time limit.

torch's own calls do not: where the process that holds the store stands still, or its host is cut
off, none of them returns, neither a ``wait`` with a time limit nor a new connection. So a thread of
each connection makes the calls, and the caller waits for that thread.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import psutil

from internvl_ds.errors import RankError

# Seconds between two looks whether the holder of the store has died.
_LOOK = 0.5

# How often the connections are cut before the process ends.
_CUTS = 5


class StoreClient:
    """One connection, which makes its calls in order.

    Once a call has not come back in time, the connection is given up: it is not known what of it
    the store will still do. Every later call fails at once.

    Attributes:
        holder: who has the store, for errors.
        dead: tells why the holder is known to be dead, or ''.
        store: torch's own connection; None until the first call has made it.
    """

    def __init__(self, connect: Callable[[], Any], holder: str, dead: Callable[[], str]) -> None:
        """Does not connect yet: the first call does, within its limit."""
        self.holder, self.dead = holder, dead
        self.store: Any = None
        self._connect = connect
        self._given_up = ''
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name='store', daemon=True)
        self._thread.start()

    def call(self, action: Callable[[Any], Any], limit: float) -> Any:
        """Calls ``action`` with torch's connection, and returns what it returns.

        Args:
            action: makes one call of the store, or several.
            limit: seconds; negative for none at all.

        Raises:
            RankError: when the store has not answered by then, or its holder is dead.
        """
        future, deadline = self.post(action), time.monotonic() + limit
        while not self._given_up:
            try:
                return future.result(max(0.0, min(_LOOK, deadline - time.monotonic())))
            except futures.TimeoutError:
                reason = self.dead()
                if not reason and time.monotonic() >= deadline:
                    reason = f'{self.holder} does not answer: waited {max(limit, 0):.3g} s'
                self._give_up(reason)
            except RankError:
                raise
            except RuntimeError as error:
                self._give_up(self.dead() or f'{self.holder} is gone: {first_line(error)}')
        raise RankError(self._given_up)

    def post(self, action: Callable[[Any], Any]) -> futures.Future:
        """Queues ``action`` behind earlier calls; does not wait."""
        future: futures.Future = futures.Future()
        if not self._given_up:
            self._calls.put((action, future))
        return future

    def close(self, limit: float) -> None:
        """Ends the thread after the queued calls; waits for it at most so many seconds."""
        self._calls.put(None)
        self._thread.join(limit)
        self._give_up('the connection to the store was closed')

    def _give_up(self, reason: str) -> None:
        if reason and not self._given_up:
            self._given_up = reason
            self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            action, future = call
            try:
                if self.store is None:
                    self.store = self._connect()
                future.set_result(action(self.store))
            except Exception as error:
                future.set_exception(error)


def first_line(error: BaseException) -> str:
    """The text of an exception without torch's C++ stack."""
    return str(error).strip().partition('\n')[0] or type(error).__name__


@contextmanager
def store_answers(
    client: StoreClient, port: int, limit: float, gone: Callable[[float], str]
) -> Iterator[None]:
    """Bounds torch's own calls to the store, which cannot move to another thread.

    While the block runs another thread asks the store as well. Where it does not answer, or a rank
    is gone whom torch would wait for, all connections of this process to it are cut, which ends the
    call that torch waits in. Where torch waits for the rank itself, which nothing ends (gloo does
    so for five times its limit), the process says why, and ends.

    Args:
        client: asks the store.
        port: the store's.
        limit: seconds that the store may take to answer.
        gone: a clause on the ranks that are dead, or do not answer for so many seconds, or ''.

    Raises:
        RankError: when it did not answer, or a rank is gone; instead of torch's own error.
    """
    over, reasons = threading.Event(), []

    def watch() -> None:
        try:
            while not over.wait(_LOOK):
                client.call(lambda store: store.check(['answers']), limit)
                if reason := gone(limit):
                    raise RankError(reason)
        except RankError as error:
            reasons.append(str(error))
            for _ in range(_CUTS):  # torch connects anew, and waits again
                _cut_connections(port)
                if over.wait(_LOOK):
                    return
            sys.excepthook(RankError, error, None)
            os._exit(1)

    threading.Thread(target=watch, name='store answers', daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if reasons:
            raise RankError(reasons[0]) from error
        raise
    finally:
        over.set()


def _cut_connections(port: int) -> None:
    for entry in psutil.Process().net_connections('tcp'):
        if entry.raddr and entry.raddr.port == port:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(entry.fd)) as connection:
                connection.shutdown(socket.SHUT_RDWR)
