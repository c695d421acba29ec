"""The other ranks, as a thread of this one sees them: names, who is dead, and waiting for all.

A place is a name in the store that every rank comes to. No place is waited at without a limit, and
a rank that is known to be dead is not waited for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as torch_dist

from internvl_ds.config.tree import default_of
from internvl_ds.dist.heartbeat import Liveness
from internvl_ds.dist.store_client import StoreClient
from internvl_ds.errors import RankError

# Seconds for what rank 0 said last to be read here.
_HEARD = 0.5

# COMM's limits as they were last told; where they were not, the defaults hold.
_limits: dict[str, float] = {}

# What a background thread meets the others through: see `background_meetings`.
_thread = threading.local()

# How many process groups this process has left: part of all keys, for a store that outlives them.
_left = 0


class Peers(NamedTuple):
    """A connection to the other ranks for one thread.

    Attributes:
        client: to the process group's store.
        rank: this process's.
        world_size: how many ranks there are.
    """

    client: StoreClient
    rank: int
    world_size: int


@dataclass
class Group:
    """What this process knows of its process group.

    Attributes:
        peers: the main thread's connection.
        names: "rank 1 on HOST (pid P)" of each rank.
        liveness: tells which ranks are dead; None until all ranks have met.
        store: torch's default store, kept alive: rank 0's may serve all others.
    """

    peers: Peers
    names: list[str]
    liveness: Liveness | None = None
    store: Any = None


_group: Group | None = None


def limit_of(key: str) -> float:
    """COMM.``key``, seconds: what this process was told last, else the default."""
    return _limits.get(key, default_of(f'COMM.{key}'))


def set_limits(limits: Mapping[str, float]) -> None:
    """Has COMM's limits hold from now on."""
    _limits.update(limits)


def current_group() -> Group | None:
    """The process group that was joined; None before, and after it was left."""
    return _group


def join_group(group: Group | None) -> None:
    """Makes a process group the current one; None leaves it."""
    global _group, _left
    if group is None and _group is not None:
        _left += 1
        if _group.liveness is not None:
            _group.liveness.stop()
        _group.peers.client.close(limit_of('SILENT_AFTER'))
    _group = group


def key_of(name: str) -> str:
    """The key of a name in the store: of this group, and of this start where torchrun restarts."""
    return f'internvl_ds/{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}.{_left}/{name}'


def own_peers() -> Peers | None:
    """What this thread was given in `background_meetings`."""
    return getattr(_thread, 'peers', None)


@contextmanager
def background_meetings(peers: Peers | None) -> Iterator[None]:
    """Lets this thread meet the other ranks' threads through a connection of its own.

    A connection serves one call at a time, and the rank and world size stay what they were, should
    the main thread leave the process group. The names of the meetings must not be in use by another
    thread meanwhile.
    """
    _thread.peers = peers
    try:
        yield
    finally:
        _thread.peers = None


def rank() -> int:
    """This process's global rank; 0 without a process group."""
    if peers := own_peers():
        return peers.rank
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are; 1 without a process group."""
    if peers := own_peers():
        return peers.world_size
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def named(ranks: list[int], most: int = 16) -> str:
    """Ranks for a message, with host and process id where they are known."""
    names = _group.names if _group else []
    text = ', '.join(names[r] if names else f'rank {r}' for r in ranks[:most])
    return text if len(ranks) <= most else f'{text} and {len(ranks) - most} more'


def dead_ranks() -> list[int]:
    """Ranks that are dead for so long that the store has got all that they said."""
    return _group.liveness.dead(for_seconds=1.0) if _group and _group.liveness else []


def dead_holder() -> str:
    """Why rank 0, with the store, will not answer any more; '' where nothing says so."""
    known = _group and _group.liveness and 0 in _group.liveness.dead()
    return _group.liveness.describe_dead() if known else ''  # type: ignore[union-attr]


def describe_gone(after: float) -> str:
    """A clause on the ranks that are dead, or that this one has not heard for so long, or ''."""
    return _group.liveness.describe_gone(after) if _group and _group.liveness else ''


def describe_silent() -> str:
    """A clause on the ranks that are dead or do not answer, or ''. Takes seconds."""
    return _group.liveness.describe_silent() if _group and _group.liveness else ''


def may_speak(is_cause: bool) -> bool:
    """Whether this rank is the first to say why the job ends; it then has to.

    Args:
        is_cause: not for what other ranks see of an error: once a rank has told a cause, they have
            nothing to say.
    """
    if _group is None or _group.liveness is None:
        return True
    kind, place = 'cause' if is_cause else 'effect', key_of('last words')

    def first(store: Any) -> bool:
        own = store.add(f'{place}/{kind}', 1) == 1
        silent = not store.check([place])
        store.set(place, kind)
        return own and (is_cause or silent)

    # A rank 0 that is silent already is not waited for.
    limit = 0 if _group.liveness.rank_0_is_silent() else limit_of('SILENT_AFTER')
    try:
        speaks = bool(_group.peers.client.call(first, limit))
    except RankError:  # the words of rank 0 may have come before its end
        time.sleep(_HEARD)
        told = _group.liveness.told
        speaks = not told or (is_cause and told == 'effect')
    if speaks:
        _group.liveness.speak(kind)
    return speaks


def ask(peers: Peers, action: Callable[[Any], Any], deadline: float) -> Any:
    """Asks the store, which has until the deadline, and always COMM.SILENT_AFTER seconds.

    Raises:
        RankError: when it does not answer, or is gone.
    """
    left = deadline - time.monotonic()
    return peers.client.call(action, max(left, limit_of('SILENT_AFTER')))


def come(peers: Peers, place: str, text: str = '') -> None:
    """Comes to a place, and leaves a text there; waits for nothing."""

    def arrive(store: Any) -> None:
        store.set(f'{place}/{peers.rank}', text)
        # The last one says that all are there, for the others to look at one key only.
        if store.add(f'{place}/count', 1) == peers.world_size:
            store.set(f'{place}/all', '')

    peers.client.post(arrive)


def leave_text(peers: Peers, place: str, text: str) -> None:
    """Replaces what this rank has left at a place."""
    peers.client.post(lambda store: store.set(f'{place}/{peers.rank}', text))


def clear(peers: Peers, place: str, *, of_all: bool = False) -> None:
    """Removes what this rank, or all, have left at a place, and on rank 0 the place."""
    keys = [f'{place}/{r}' for r in range(peers.world_size) if of_all or r == peers.rank]
    keys += [f'{place}/count', f'{place}/all'] if peers.rank == 0 else []
    peers.client.post(lambda store: list(map(store.delete_key, keys)))


def missing_at(peers: Peers, place: str, deadline: float, *, without_dead: bool) -> list[int]:
    """Waits until all ranks have come to a place.

    Args:
        peers: this thread's.
        place: its name.
        deadline: of `time.monotonic`.
        without_dead: go on without ranks that are dead, once the others have come; else their death
            ends the wait.

    Returns:
        The ranks that have not come; none where all have.

    Raises:
        RankError: when the store does not answer, or is gone.
    """
    start = time.monotonic()
    while True:
        now, dead = time.monotonic(), dead_ranks()
        if ask(peers, lambda store: store.check([f'{place}/all']), deadline):
            return []
        everyone = list(range(peers.world_size))
        asked = everyone if now > deadline or (without_dead and dead) else dead

        def absent(store: Any, asked: list[int] = asked) -> list[int]:
            return [r for r in asked if not store.check([f'{place}/{r}'])]

        missing = ask(peers, absent, deadline) if asked else []
        if now > deadline or (set(missing) <= set(dead) if without_dead and dead else missing):
            return missing
        time.sleep(min(0.5, max(0.001, 0.1 * (now - start))))
