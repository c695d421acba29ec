"""A connection to the other ranks, through the process group's store.

A place is a name in the store that every rank comes to. No place is waited at without a limit, and
a rank that is known to be dead is not waited for.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch.distributed as torch_dist

from internvl_ds.dist.group import current_group
from internvl_ds.dist.store_client import StoreClient


class Peers(NamedTuple):
    """A connection to the other ranks, which any thread may use.

    Attributes:
        client: to the process group's store.
        rank: this process's.
        world_size: how many ranks there are.
    """

    client: StoreClient
    rank: int
    world_size: int

    def ask(self, action: Callable[[Any], Any], deadline: float) -> Any:
        """Calls the store, which has until the deadline, and at least COMM.SILENT_AFTER seconds.

        Raises:
            RankError: when it does not answer, or is gone.
        """
        seconds = deadline - time.monotonic()
        return self.client.call(action, max(seconds, current_group().limit('SILENT_AFTER')))

    def put(self, key: str, text: str) -> None:
        """Sets a key of the store; does not wait."""
        self.client.post(lambda store: store.set(key, text))

    def come(self, place: str, text: str = '') -> None:
        """Arrives at a place, and leaves a text there; does not wait."""

        def arrive(store: Any) -> None:
            store.set(f'{place}/{self.rank}', text)
            # The last one puts all texts in one key: a thousand ranks would read a million.
            if store.add(f'{place}/count', 1) == self.world_size:
                store.set(
                    f'{place}/all', _together(store.multi_get(self._keys(place)) if text else [])
                )

        self.client.post(arrive)

    def bring(self, place: str, value: Any, deadline: float) -> None:
        """Leaves a value at a place to which not every rank may come; waits until it is there.

        Args:
            value: anything JSON can hold, small.
        """
        self.come(place, json.dumps(value))
        self.ask(lambda store: None, deadline)

    def brought(self, place: str, deadline: float) -> list[Any] | None:
        """The value of each rank, in rank order; None if a rank has not come."""
        if not self.ask(lambda store: store.check([f'{place}/all']), deadline):
            return None
        return [json.loads(text) for text in self.texts_at(place, deadline)]

    def texts_at(self, place: str, deadline: float) -> list[str]:
        """What each rank has left at a place, in rank order, once all have come."""

        def read(store: Any) -> Any:
            if not store.check([f'{place}/all']):  # the last died before it could say so
                return [text.decode() for text in store.multi_get(self._keys(place))]
            runs = json.loads(store.get(f'{place}/all'))
            return [text for text, count in runs for _ in range(count)]

        return self.ask(read, deadline)

    def _keys(self, place: str) -> list[str]:
        return [f'{place}/{r}' for r in range(self.world_size)]

    def clear(self, place: str) -> None:
        """Removes what this rank brought to a place that all have left; on rank 0 the place too."""
        self._remove(place, self.rank == 0)

    def leave(self, place: str) -> None:
        """Removes what this rank brought to a place, and the place."""
        self._remove(place, True)

    def _remove(self, place: str, with_place: bool) -> None:
        names = [self.rank, *(['count', 'all'] if with_place else [])]
        self.client.post(lambda store: [store.delete_key(f'{place}/{name}') for name in names])

    def missing_at(self, place: str, deadline: float, *, without_dead: bool) -> list[int]:
        """Waits until all ranks have arrived at a place.

        Args:
            place: its name.
            deadline: of `time.monotonic`.
            without_dead: go on without ranks that are dead, once the others have come; else their
                death ends the wait.

        Returns:
            The ranks that have not come; none where all have.

        Raises:
            RankError: when the store does not answer, or is gone.
        """

        def of(ranks: Sequence[int]) -> list[int]:
            def not_come(store: Any, ranks: Sequence[int]) -> list[int]:
                # By halves: of a thousand ranks few are missing, and all others ask for them.
                if not ranks or store.check([f'{place}/{r}' for r in ranks]):
                    return []
                half = len(ranks) // 2
                parts = (ranks[:half], ranks[half:])
                return [r for part in parts for r in not_come(store, part)] if half else [*ranks]

            return self.ask(lambda store: not_come(store, ranks), deadline) if ranks else []

        start = time.monotonic()
        while True:
            now, dead_ranks = time.monotonic(), current_group().dead_ranks()
            if self.ask(lambda store: store.check([f'{place}/all']), deadline):
                return []
            if not without_dead and (absentees := of(dead_ranks)):
                return absentees
            # A rank that came as the last may have died before it could say that all are there.
            alive = self.world_size - len(dead_ranks)
            is_late = now > deadline
            if is_late or (dead_ranks and self._count(place, deadline) >= alive):
                absentees = of(range(self.world_size))
                if is_late or set(absentees) <= set(dead_ranks):
                    return absentees
            time.sleep(min(0.5, max(0.001, 0.1 * (now - start))))

    def _count(self, place: str, deadline: float) -> int:
        """How many ranks have come; a rank that died as it came does not count."""
        return int(self.ask(lambda store: store.add(f'{place}/count', 0), deadline))


def _together(texts: list[bytes]) -> str:
    """JSON of each text and how often it comes in a row; in most meetings all are the same."""
    runs = itertools.groupby(text.decode() for text in texts)
    return json.dumps([[text, sum(1 for _ in same)] for text, same in runs])


# The peers of a background thread: see `background_meetings`.
thread_peers: ContextVar[Peers | None] = ContextVar('thread_peers', default=None)


@contextmanager
def background_meetings(peers: Peers | None) -> Iterator[None]:
    """Has this thread meet the threads of other ranks.

    The rank and world size stay what they were, should the main thread leave the process group. The
    names of the meetings must not be in use by another thread meanwhile.
    """
    token = thread_peers.set(peers)
    try:
        yield
    finally:
        thread_peers.reset(token)


def rank() -> int:
    """This process's global rank; 0 without a process group."""
    if peers := thread_peers.get():
        return peers.rank
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are; 1 without a process group."""
    if peers := thread_peers.get():
        return peers.world_size
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1
