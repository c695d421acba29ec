"""Which ranks are dead, and which do not answer.

Each rank holds a connection to rank 0. The kernel closes it when the process ends, however it ends,
and when its host has not answered for COMM.DEAD_AFTER seconds; rank 0 tells the others. A rank that
computes for long, or was stopped, is not dead. All the while each asks rank 0 whether it is there,
so that who was stopped is known as soon as a wait is over.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from internvl_ds.dist.network import address_towards
from internvl_ds.errors import few
from internvl_ds.files import forks

logger = logging.getLogger(__name__)


class Offer(NamedTuple):
    """Rank 0's address, and the secret that a rank sends to connect. JSON."""

    addresses: list[str]
    port: int
    token: str


class _Link:
    """A connection to another rank."""

    def __init__(self, connection: socket.socket, rank: int | None, dead_after: float) -> None:
        self.connection, self.rank, self.received = connection, rank, b''
        self.heard = time.monotonic()  # when anything came last
        seconds = {'TCP_KEEPIDLE': dead_after / 2, 'TCP_KEEPINTVL': dead_after / 6}
        options = {name: min(max(1, round(value)), 32767) for name, value in seconds.items()}
        options |= {'TCP_KEEPCNT': 3, 'TCP_USER_TIMEOUT': min(int(1000 * dead_after), 2**31 - 1)}
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def tell(self, *words: object) -> None:
        # A link that cannot be written to is found broken where it is read.
        with contextlib.suppress(OSError):
            self.connection.sendall(' '.join(map(str, words)).encode() + b'\n')


def listen() -> tuple[socket.socket, Offer]:
    """On rank 0: opens the port that the other ranks are to connect to."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(('', 0), family=family, backlog=4096, dualstack_ipv6=both)
    master = os.environ.get('MASTER_ADDR', '127.0.0.1')
    # Under torchrun the master need not be rank 0's host: then the address towards it.
    addresses = [master, address_towards(master) or master]
    return listener, Offer(addresses, listener.getsockname()[1], secrets.token_hex(16))


class Liveness:
    """This rank's connection to rank 0, or rank 0's to all others."""

    def __init__(
        self,
        rank: int,
        names: Sequence[str],
        offer: Offer,
        listener: socket.socket | None,
        limits: dict[str, float],
    ) -> None:
        """Connects, and answers from then on.

        Args:
            rank: this process's.
            names: "rank 1 on HOST (pid P)" of each rank.
            offer: rank 0's, the same on all ranks.
            listener: on rank 0 only: of this offer.
            limits: CONNECT_TIMEOUT, DEAD_AFTER, SILENT_AFTER of COMM, seconds.
        """
        self._rank, self._names, self._token = rank, names, offer.token
        self._limits, self._listener = limits, listener
        self._silent_after = limits['SILENT_AFTER']
        self.words = ''  # 'cause', 'effect' or '': see `speak`
        self._deaths: dict[int, float] = {}  # rank -> when that was noticed
        self._left: set[int] = set()  # ranks that said so before their connection closed
        self.on_death: Callable[[], None] = lambda: None  # called once, of one that had not
        self._links: list[_Link] = []
        self._answer: list[int] | None = None  # of rank 0: who is silent
        self._stopped = False
        if listener is None:
            self._connect(offer)
        # A fork copies each connection, and the kernel closes one with its last copy only.
        forks.at_fork(self, self._close)
        threading.Thread(target=self._run, name='liveness', daemon=True).start()

    def dead(self, for_seconds: float = 0.0) -> list[int]:
        """The ranks that are known to be dead for so long, in the order in which they died."""
        now = time.monotonic()
        return [rank for rank, since in list(self._deaths.items()) if now - since >= for_seconds]

    def lost(self, for_seconds: float) -> list[int]:
        """As `dead`, without the ranks that left the process group in order."""
        return [rank for rank in self.dead(for_seconds) if rank not in self._left]

    def describe_dead(self) -> str:
        """A clause that names dead ranks; '' if none is known."""
        names = [self._names[rank] for rank in self.dead()]
        verb = 'is' if len(names) == 1 else 'are'
        what = 'the process has ended or its host is cut off'
        return f'{few(names)} {verb} dead ({what})' if names else ''

    def describe_silent(self) -> str:
        """A clause that names dead and silent ranks; '' if all answer. Takes seconds."""
        silent = self._ask_rank_0() if self._listener is None else self._silent()
        return self._describe(silent, self._silent_after)

    def describe_gone(self, after: float) -> str:
        """A clause that names ranks that are dead or silent for so many seconds, or ''."""
        return self._describe(self._unheard(after), after)

    def _describe(self, silent: list[int], seconds: float) -> str:
        clauses = [self.describe_dead()]
        if names := [self._names[rank] for rank in silent if rank not in self._deaths]:
            verb = 'has' if len(names) == 1 else 'have'
            clauses.append(f'{few(names)} {verb} given no sign of life for {seconds:g} s')
        return '; '.join(filter(None, clauses))

    def stop(self) -> None:
        """Closes the connections: the others take this rank for ended."""
        self._stopped = True
        forks.forget(self)
        for link in self._links:
            link.tell('left', self._rank)
        self._close()

    def _close(self) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):
                if self._stopped:
                    link.connection.shutdown(socket.SHUT_RDWR)
                link.connection.close()
        if self._listener is not None:
            self._listener.close()

    def _connect(self, offer: Offer) -> None:
        errors = []
        for address in dict.fromkeys(offer.addresses):
            try:
                limit = self._limits['CONNECT_TIMEOUT']
                connection = socket.create_connection((address, offer.port), limit)
                link = _Link(connection, 0, self._limits['DEAD_AFTER'])
                link.tell('hello', offer.token, self._rank)
                if connection.recv(8) != b'welcome\n':
                    raise OSError('it is another program that listens there')
                connection.settimeout(None)
            except OSError as error:
                errors.append(f'{address}:{offer.port}: {error}')
            else:
                self._links.append(link)
                return
        logger.warning(
            'rank %d cannot connect to rank 0 beside the store (%s): a rank that dies will be '
            'missed only when a time limit is over',
            self._rank,
            '; '.join(errors),
        )

    def rank_0_is_silent(self) -> bool:
        """Whether rank 0 has not answered this one for COMM.SILENT_AFTER seconds."""
        return self._listener is None and bool(self._unheard(self._silent_after))

    def speak(self, kind: str) -> None:
        """Announces to all ranks that this one reports why the job ends: 'cause' or 'effect'."""
        self.words = kind
        for link in self._links:
            link.tell('spoke', kind)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in self._links:
                selector.register(link.connection, selectors.EVENT_READ, link)
            if self._listener is not None:
                selector.register(self._listener, selectors.EVENT_READ)
            due = 0.0
            while not self._stopped and selector.get_map():
                if (now := time.monotonic()) >= due:
                    due = now + self._silent_after / 4
                    if self._listener is None:
                        self._links[0].tell('ask')
                for key, _ in selector.select(due - now):
                    try:
                        if key.data is None:
                            self._let_in(selector)
                        else:
                            self._read(key.data)
                    except (OSError, ValueError, TypeError, IndexError):  # gone, or no rank
                        if key.data is not None:
                            self._lose(selector, key.data)

    def _let_in(self, selector: selectors.BaseSelector) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        link = _Link(connection, None, self._limits['DEAD_AFTER'])
        self._links.append(link)
        selector.register(connection, selectors.EVENT_READ, link)

    def _read(self, link: _Link) -> None:
        data = link.connection.recv(4096)
        if not data or len(link.received) > 1 << 20:
            raise ConnectionError
        link.heard = time.monotonic()
        *lines, link.received = (link.received + data).split(b'\n')
        for line in lines:
            self._hear(link, *line.decode().split())

    def _lose(self, selector: selectors.BaseSelector, link: _Link) -> None:
        rank = None if self._stopped else link.rank
        if rank is not None:  # before the link goes: whoever finds none must find its rank dead
            self._note_death(rank)
        selector.unregister(link.connection)
        self._links.remove(link)
        link.connection.close()
        if rank is not None:
            for other in self._links:
                other.tell('dead', rank)

    def _note_death(self, rank: int) -> None:
        is_first = not self.lost(0)
        self._deaths.setdefault(rank, time.monotonic())
        if is_first and rank not in self._left:
            self.on_death()

    def _hear(self, link: _Link, word: str, *values: Any) -> None:
        if link.rank is None:  # rank 0 hears from someone new
            if word != 'hello' or not secrets.compare_digest(values[0], self._token):
                raise ConnectionError
            link.rank = int(values[1])
            link.tell('welcome')
            for rank in self._deaths:
                link.tell('dead', rank)
        elif word == 'ask':
            link.tell('here')
        elif word == 'dead':
            self._note_death(int(values[0]))
        elif word == 'left':
            self._left.add(int(values[0]))
            for other in self._links if self._listener is not None else ():
                other.tell('left', values[0])
        elif word == 'spoke':
            if self._listener is None:
                self.words = values[0]
            else:
                self.speak(values[0])
        elif word == 'look':  # asks rank 0 who is silent, which takes a while
            threading.Thread(
                target=lambda: link.tell('silent', *self._silent()), daemon=True
            ).start()
        elif word == 'silent':
            self._answer = list(map(int, values))

    def _unheard(self, seconds: float) -> list[int]:
        """The connected ranks that have sent nothing for so many seconds."""
        since = time.monotonic() - seconds
        links = [link for link in list(self._links) if link.heard < since]
        return [link.rank for link in links if link.rank is not None]

    def _silent(self) -> list[int]:
        """On rank 0: the ranks that do not answer it."""
        start = time.monotonic()
        for link in list(self._links):
            link.tell('ask')
        while set(self._unheard(time.monotonic() - start)) - set(self._unheard(self._silent_after)):
            time.sleep(0.05)
        return self._unheard(self._silent_after)

    def _ask_rank_0(self) -> list[int]:
        self._answer = None
        for link in list(self._links):
            link.tell('look')
        while self._links and self._answer is None:
            if silent := self._unheard(self._silent_after):
                return silent
            time.sleep(0.05)
        return self._answer or []
