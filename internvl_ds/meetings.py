"""Meetings of all ranks, named and with a time limit, to tell each other what they did or found.

They go through the process group's store, not through a collective of the training group, so that a
rank that does not come is named instead of waited for.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as torch_dist
from torch.distributed import distributed_c10d

from internvl_ds.errors import InternvlDsError, RankError

T = TypeVar('T')

logger = logging.getLogger(__name__)

# Seconds that rank 0 waits at the end for ranks that are still busy.
_LAST_WAIT = 60

# How many meetings of each name this rank has been through: part of the key that they meet under.
_rounds: Counter[str] = Counter()

# What a background thread meets the others through: see `background_meetings`.
_thread = threading.local()


def rank() -> int:
    """This process's global rank; 0 without a process group."""
    if peers := _peers():
        return peers.rank
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are; 1 without a process group."""
    if peers := _peers():
        return peers.world_size
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def exchange(what: str, value: Any, timeout: float) -> list[Any]:
    """Meets all ranks and hands every rank what each of them brought, in rank order.

    Args:
        what: the name of the meeting, the same on all ranks; it stands in the error.
        value: anything JSON can hold, small (it travels through rank 0's store).
        timeout: seconds to wait for the others.

    Raises:
        RankError: when a rank does not come in time; it names the ranks that are missing.
    """
    if world_size() == 1:
        return [value]
    store = _store()
    deadline = time.monotonic() + timeout
    while True:
        keys = [f'internvl_ds/{what}/{_rounds[what]}/{r}' for r in range(world_size())]
        store.set(keys[rank()], json.dumps({'value': value}))
        _wait_for_keys(store, keys, what, timeout, deadline)
        brought = [json.loads(text) for text in store.multi_get(keys)]
        if _rounds[what]:
            # Whoever came to this round is through with the one before.
            store.delete_key(f'internvl_ds/{what}/{_rounds[what] - 1}/{rank()}')
        _rounds[what] += 1
        if all('value' in item for item in brought):
            _let_all_read(store, f'internvl_ds/{what}/{_rounds[what] - 1}')
            return [item['value'] for item in brought]
        # Others gave this round up before this rank came: they meet in the next one, if at all.


def _let_all_read(store: Any, name: str) -> None:
    """Has rank 0, which holds the store, go on (and perhaps end) after every rank has read."""
    count, done = f'{name}/have read', f'{name}/all have read'
    if rank() != 0:
        if store.add(count, 1) == world_size() - 1:
            store.set(done, '')
        return
    try:
        store.wait([done], timedelta(seconds=_LAST_WAIT))
    except RuntimeError:  # this rank has what it needs; the next meeting names who is missing
        logger.warning('%s: not all ranks have read it after %d s', name, _LAST_WAIT)
    store.delete_key(count)
    store.delete_key(done)


def _wait_for_keys(store: Any, keys: list[str], what: str, timeout: float, deadline: float) -> None:
    try:
        store.wait(keys, timedelta(seconds=max(0.1, deadline - time.monotonic())))
    except RuntimeError as error:
        mine = rank()
        try:
            missing = [r for r, key in enumerate(keys) if not store.check([key])]
        except RuntimeError:
            raise RankError(f'{what}: rank {mine} lost the store of rank 0: {error}') from error
        if not missing:  # the last one came just now
            return
        store.set(keys[mine], json.dumps({'gave up': mine}))
        _rounds[what] += 1
        raise RankError(
            f'{what}: rank {mine} waited {timeout:g} s and rank {_listed(missing)} did not come. '
            'Every rank must make this call: remove an `if rank == 0` around it, and look in the '
            'output of the missing rank for an error of its own.'
        ) from error


def raise_request(name: str) -> None:
    """Tells every rank that asks `request_is_raised`; any rank may call it. Not a meeting."""
    _store().set(f'internvl_ds/request/{name}', '')


def request_is_raised(name: str) -> bool:
    """Whether any rank has called `raise_request` with this name."""
    return bool(_store().check([f'internvl_ds/request/{name}']))


def gather(what: str, value: Any, timeout: float) -> list[Any] | None:
    """Meets all ranks and hands rank 0 alone what each of them brought, in rank order.

    For values too large for every rank to read from every other, as `exchange` has it.

    Args:
        what, value, timeout: as in `exchange`.

    Raises:
        RankError: as `exchange` does.
    """
    if world_size() == 1:
        return [value]
    store = _store()
    # Under a name of its own: the next gathering may begin while rank 0 still reads this one.
    _rounds['gather'] += 1
    own = f'internvl_ds/brought/{_rounds["gather"]}/{rank()}'
    store.set(own, json.dumps(value))
    keys = exchange(what, own, timeout)
    if rank() != 0:
        return None
    brought = [json.loads(text) for text in store.multi_get(keys)]
    for key in keys:
        store.delete_key(key)
    return brought


class Peers(NamedTuple):
    """A connection to the other ranks for one background thread.

    Attributes:
        store: a further connection to the process group's store.
        rank: this process's.
        world_size: how many ranks there are.
        group_store: the group's own connection, kept alive: rank 0's serves all others.
    """

    store: Any
    rank: int
    world_size: int
    group_store: Any


def connect_peers() -> Peers | None:
    """Opens a connection for a background thread; None where this is the only rank.

    To be called in the main thread, on every rank that will use one.
    """
    if world_size() == 1:
        return None
    store = distributed_c10d._get_default_store()
    return Peers(store.clone(), rank(), world_size(), store)


@contextmanager
def background_meetings(peers: Peers | None) -> Iterator[None]:
    """Lets this thread meet the other ranks' threads through a connection of its own.

    The default connection serves one call at a time: a wait on it would keep the main thread from
    using it. And the rank and world size stay what they were, should the main thread leave the
    process group. The names of the meetings must not be in use by another thread meanwhile.
    """
    _thread.peers = peers
    try:
        yield
    finally:
        _thread.peers = None


def _peers() -> Peers | None:
    return getattr(_thread, 'peers', None)


def _store() -> Any:
    peers = _peers()
    return peers.store if peers else distributed_c10d._get_default_store()


def agree(
    what: str,
    action: Callable[[], T],
    timeout: float,
    error_type: type[InternvlDsError] = InternvlDsError,
) -> T:
    """Runs ``action`` on this rank, then lets all ranks go on only if it succeeded on every one.

    Args:
        what: the name of the meeting, the same on all ranks.
        action: this rank's part; it may raise.
        timeout: seconds to wait for the others.
        error_type: what the ranks raise whose own part went well.

    Returns:
        What this rank's ``action`` returned.

    Raises:
        Exception: this rank's own, as it was; or ``error_type``, naming the ranks that failed and
            why; or RankError when a rank does not come.
    """
    result: T | None = None
    own: Exception | None = None
    try:
        result = action()
    except Exception as error:
        own = error
    reports = exchange(what, None if own is None else f'{type(own).__name__}: {own}', timeout)
    if own is not None:
        raise own
    failed = {r: report for r, report in enumerate(reports) if report is not None}
    if failed:
        raise error_type(f'{what}: ' + '; '.join(f'rank {r}: {text}' for r, text in failed.items()))
    return result  # type: ignore[return-value]


def from_rank_0(what: str, action: Callable[[], Any], timeout: float) -> Any:
    """Runs ``action`` on rank 0 alone and hands its result (anything JSON can hold) to all ranks.

    Raises:
        Exception: rank 0's own there, and the same type with the same text on the other ranks
            where it is one of this package's errors; RankError when a rank does not come.
    """
    answer: dict[str, Any] = {}
    own: Exception | None = None
    if rank() == 0:
        try:
            answer = {'result': action()}
        except Exception as error:
            own = error
            answer = {'error': type(error).__name__, 'text': str(error)}
    answer = exchange(what, answer, timeout)[0]
    if own is not None:
        raise own
    if 'error' in answer:
        known = {c.__name__: c for c in _all_subclasses(InternvlDsError)}
        raise known.get(answer['error'], InternvlDsError)(answer['text'])
    return answer['result']


def _all_subclasses(base: type) -> list[type]:
    found: list[type] = list(base.__subclasses__())
    return found + [c for child in found for c in _all_subclasses(child)]


def _listed(ranks: list[int], most: int = 16) -> str:
    text = ', '.join(map(str, ranks[:most]))
    return text if len(ranks) <= most else f'{text} and {len(ranks) - most} more'


def part_from(peers: Peers) -> None:
    """Has rank 0 wait, where `shutdown` is not called, until the others need its store no more.

    Every rank that has these peers calls it at its end.
    """
    with background_meetings(peers):
        try:
            wait_for_the_others()
        except RuntimeError as error:  # rank 0 is gone: then there is nothing left to wait for
            logger.info('rank %d ends without rank 0: %s', rank(), error)


def wait_for_the_others() -> None:
    """Has rank 0, whose store the others may still read, wait until all have come here."""
    store = _store()
    keys = [f'internvl_ds/left/{r}' for r in range(world_size())]
    store.set(keys[rank()], '')
    if rank() == 0:
        try:
            store.wait(keys, timedelta(seconds=_LAST_WAIT))
        except RuntimeError:
            late = [r for r, key in enumerate(keys) if not store.check([key])]
            logger.warning('rank 0 leaves; rank %s is not done yet', _listed(late))


def forget_meetings() -> None:
    """Begins to count anew, for another process group."""
    _rounds.clear()
