"""Many ranks in one process, each a thread, which meet through a store that counts.

    counts, results = simulate(1024, lambda: exchange('save', None, 60))

What the ranks run is the package's own code. Of the process group each has its own part (`rounds`),
and its calls of the store are made at once and counted: how many, and how many bytes it is given.
One rank runs at a time, until it would sleep; then the next one does. So counts are the same in
each run.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any
from unittest import mock

from internvl_ds.dist import peers as peers_module
from internvl_ds.dist import rendezvous
from internvl_ds.dist.group import ProcessGroup
from internvl_ds.dist.peers import Peers, background_meetings

_STACK = 256 << 10  # bytes of a thread


@dataclasses.dataclass
class Counts:
    """What one rank has asked of the store."""

    calls: int = 0  # round trips
    keys: int = 0
    bytes: int = 0  # that it was given
    looks: int = 0  # calls that ask whether ranks have come, one by one or several


class Store:
    """The keys of all ranks, with the calls of torch's store that the package makes."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._values)

    def of(self, counts: Counts) -> Any:
        """One rank's connection."""
        return _Connection(self._values, counts)


class _Connection:
    def __init__(self, values: dict[str, bytes], counts: Counts) -> None:
        self._values, self._counts = values, counts

    def call(self, action: Callable[[Any], Any], limit: float) -> Any:
        return action(self)

    def post(self, action: Callable[[Any], Any]) -> None:
        action(self)

    def set(self, key: str, text: str) -> None:
        self._count(1)
        self._values[key] = text.encode()

    def get(self, key: str) -> bytes:
        return self._given([self._values[key]])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._given([self._values[key] for key in keys])

    def check(self, keys: list[str]) -> bool:
        self._count(len(keys))
        self._counts.looks += not keys[0].endswith('/all')
        return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        self._count(1)
        count = int(self._values.get(key, b'0')) + amount
        self._values[key] = str(count).encode()
        return count

    def delete_key(self, key: str) -> bool:
        self._count(1)
        return self._values.pop(key, None) is not None

    def _given(self, texts: list[bytes]) -> list[bytes]:
        self._count(len(texts))
        self._counts.bytes += sum(map(len, texts))
        return texts

    def _count(self, keys: int) -> None:
        self._counts.calls += 1
        self._counts.keys += keys


def simulate(
    ranks: int, action: Callable[[], Any], store: Store | None = None
) -> tuple[list[Counts], list[Any]]:
    """Has each rank call ``action``; what each asked of the store, and what each call returned."""
    store = Store() if store is None else store
    counts, results = [Counts() for _ in range(ranks)], [None] * ranks
    own, turns = threading.local(), _Turns(ranks)

    def run(rank: int) -> None:
        own.group = ProcessGroup(rounds=Counter(), names=[f'rank {r}' for r in range(ranks)])
        peers: Any = Peers(store.of(counts[rank]), rank, ranks)
        turns.begin(rank)
        try:
            with background_meetings(peers):
                results[rank] = action()
        except Exception as error:
            results[rank] = error
        turns.end()

    def own_group() -> ProcessGroup:
        return own.group

    before = threading.stack_size(_STACK)
    threads = [threading.Thread(target=run, args=[rank], daemon=True) for rank in range(ranks)]
    with (
        mock.patch.object(rendezvous, 'current_group', own_group),
        mock.patch.object(peers_module, 'current_group', own_group),
        mock.patch.object(peers_module.time, 'sleep', turns.give_up),
    ):
        for thread in threads:
            thread.start()
        threading.stack_size(before)
        turns.end()
        for thread in threads:
            thread.join(600)
    if errors := [result for result in results if isinstance(result, Exception)]:
        raise errors[0]
    return counts, results


class _Turns:
    """Has one of many threads run at a time."""

    def __init__(self, ranks: int) -> None:
        self._doors = [threading.Semaphore(0) for _ in range(ranks)]
        self._queue, self._now = deque(range(ranks)), -1

    def begin(self, rank: int) -> None:
        """Waits for this thread's turn."""
        self._doors[rank].acquire()
        self._now = rank

    def give_up(self, seconds: float) -> None:
        """Lets all others run first."""
        own = self._now
        self._queue.append(own)
        self.end()
        self.begin(own)

    def end(self) -> None:
        """Lets the next one run; this thread does not come again."""
        if self._queue:
            self._doors[self._queue.popleft()].release()
