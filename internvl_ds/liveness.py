"""Which ranks still answer: asked when a collective fails, to name the one that is gone.

A thread of each rank counts up in rank 0's store. A rank that was killed or stopped, or whose host
is cut off, does not; one that only computes for long does.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import threading
import time
from typing import Any

from internvl_ds.errors import few

logger = logging.getLogger(__name__)

_PERIOD = 1.0  # seconds between two signs of life
_PATIENCE = 4.0  # seconds without one, after which a rank is silent
_LIMIT = 15.0  # seconds that finding out may take

# Holds, once a rank has said why the job ends, whether that was its cause or an effect of it.
_WORDS = 'internvl_ds/last words'


class Liveness:
    """This rank's signs of life, and a look at those of the others."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        """Starts to give them.

        Args:
            store: a connection to the process group's store, used by nothing else.
            rank: this process's.
            world_size: how many ranks there are.
        """
        self._store, self._rank, self._world_size = store, rank, world_size
        self._lock = threading.Lock()
        self._told = ''
        self._stopped = threading.Event()
        self._give(0)
        self._thread = threading.Thread(target=self._run, name='liveness', daemon=True)
        self._thread.start()
        # A thread inside the store when the interpreter is torn down can abort the process.
        atexit.register(self.stop)

    def stop(self) -> None:
        """Gives no more signs; before the process group is left."""
        self._stopped.set()
        self._thread.join(_PERIOD)

    def describe_silent(self) -> str:
        """A sentence on the ranks that give no sign of life; '' where all do. Takes seconds."""
        found: list[str] = []
        looking = threading.Thread(target=lambda: found.append(self._look()), daemon=True)
        looking.start()
        looking.join(_LIMIT)
        return found[0] if found else 'the store of rank 0 does not answer: its host is cut off'

    def may_speak(self, is_cause: bool) -> bool:
        """Whether this rank is the first to say why the job ends; it then has to.

        Args:
            is_cause: not for what other ranks see of an error: once a rank has told a cause, they
                have nothing to say.
        """
        found: list[bool] = []

        def ask() -> None:
            try:
                with self._lock:
                    first = self._store.add(f'{_WORDS}/{_kind(is_cause)}', 1) == 1
                    found.append(first and (is_cause or not self._store.check([_WORDS])))
                    self._store.set(_WORDS, _kind(is_cause))
            except RuntimeError as error:
                logger.info('rank %d lost the store of rank 0: %s', self._rank, error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_PATIENCE)
        return found[0] if found else not self._told or (is_cause and self._told == _kind(False))

    def let_all_hear(self) -> None:
        """Has rank 0, which holds the store, stay until the others have seen that it has spoken."""
        if self._rank == 0:
            time.sleep(2 * _PERIOD)

    def _run(self) -> None:
        count = 0
        while not self._stopped.wait(_PERIOD):
            count += 1
            try:
                self._give(count)
                with self._lock:
                    if self._store.check([_WORDS]):
                        self._told = self._store.get(_WORDS).decode()
            except RuntimeError as error:
                logger.info('rank %d lost the store of rank 0: %s', self._rank, error)
                return

    def _give(self, count: int) -> None:
        sign = [count, socket.gethostname(), os.getpid()]
        with self._lock:
            self._store.set(_key(self._rank), json.dumps(sign))

    def _look(self) -> str:
        try:
            first = self._signs()
            time.sleep(_PATIENCE)
            later = self._signs()
        except RuntimeError as error:
            return f'rank 0, which holds the store, is gone ({error})'
        silent = [rank for rank in later if later[rank] == first.get(rank) and rank != self._rank]
        names = [f'rank {rank} on {later[rank][1]} (pid {later[rank][2]})' for rank in silent]
        if not names:
            return ''
        verb = 'has' if len(names) == 1 else 'have'
        return f'{few(names)} {verb} given no sign of life for {_PATIENCE:g} s'

    def _signs(self) -> dict[int, list[Any]]:
        with self._lock:
            keys = [_key(rank) for rank in range(self._world_size)]
            there = [rank for rank, key in enumerate(keys) if self._store.check([key])]
            texts = self._store.multi_get([keys[rank] for rank in there])
        return {rank: json.loads(text) for rank, text in zip(there, texts, strict=True)}


def _kind(is_cause: bool) -> str:
    return 'cause' if is_cause else 'effect'


def _key(rank: int) -> str:
    return f'internvl_ds/alive/{rank}'
