"""Meetings of all ranks, named and with a time limit, in which they exchange values.

They go through the process group's store, not through a collective of the training group, so that a
rank that does not come is named instead of waited for.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed import distributed_c10d

from internvl_ds import errors
from internvl_ds.dist.group import current_group
from internvl_ds.dist.heartbeat import Liveness, Offer, listen
from internvl_ds.dist.peers import Peers, thread_peers
from internvl_ds.dist.peers import rank as rank
from internvl_ds.dist.peers import world_size as world_size
from internvl_ds.dist.store_client import StoreClient, first_line
from internvl_ds.dist.stranded import is_of_collective
from internvl_ds.errors import InternvlDsError, RankError

T = TypeVar('T')

logger = logging.getLogger(__name__)


def exchange(
    what: str, value: Any, timeout: float, *, warn: Callable[[str], None] | None = None
) -> list[Any]:
    """Meets all ranks and hands every rank the value of each, in rank order.

    Collective: every rank calls it.

    Args:
        what: the name of the meeting, the same on all ranks; it stands in the error.
        value: anything JSON can hold, small (it travels through rank 0's store).
        timeout: seconds to wait for the others.
        warn: told once who has not come after COMM.WARN_AFTER seconds, on the lowest rank that has.

    Raises:
        RankError: when a rank does not come in time, or is known to be dead; it is named.
    """
    if world_size() == 1:
        return [value]
    deadline = time.monotonic() + timeout
    return _exchange(connection(what, timeout), what, value, timeout, deadline, warn)


def _exchange(
    peers: Peers,
    what: str,
    value: Any,
    timeout: float,
    deadline: float,
    warn: Callable[[str], None] | None = None,
) -> list[Any]:
    group = current_group()
    while True:
        turn = group.rounds[what]
        place = group.key(f'{what}/{turn}')
        peers.come(place, json.dumps({'value': value}))
        try:
            if warn is not None and group.limit('WARN_AFTER') < timeout:
                _warn_of_absentees(peers, what, place, timeout, warn)
            warn = None
            if absentees := peers.missing_at(place, deadline, without_dead=False):
                raise RankError(_reproach(absentees, peers.rank, timeout))
        except RankError as error:
            peers.put(f'{place}/{peers.rank}', json.dumps({'gave up': peers.rank}))
            group.rounds[what] += 1
            raise RankError(f'{what}: {error}') from None
        items = [json.loads(text) for text in peers.texts_at(place, deadline)]
        if turn:  # a rank that came to this round has left the round before
            before = group.key(f'{what}/{turn - 1}')
            peers.clear(before)
            peers.clear(f'{before}/read')
        group.rounds[what] += 1
        if all('value' in item for item in items):
            _let_all_read(peers, f'{place}/read', deadline)
            return [item['value'] for item in items]
        # Others gave this round up before this rank came: they meet in the next one, if at all.


def _warn_of_absentees(
    peers: Peers, what: str, place: str, timeout: float, warn: Callable[[str], None]
) -> None:
    """Waits for at most COMM.WARN_AFTER seconds, then names the absent ranks."""
    group = current_group()
    if not (seconds := group.limit('WARN_AFTER')):
        return
    absentees = peers.missing_at(place, time.monotonic() + seconds, without_dead=False)
    present = set(range(peers.world_size)).difference(absentees)
    if absentees and peers.rank == min(present) and not set(absentees) & set(group.dead_ranks()):
        warn(
            f'{what}: rank {peers.rank} has waited {seconds:g} s, and {group.named(absentees)} has '
            'not come. Every rank must make this call: if it stands under `if dist.get_rank() == '
            f'0`, remove that condition. If not, nothing is lost: it waits up to {timeout:g} s.'
        )


def _reproach(absentees: list[int], own_rank: int, timeout: float) -> str:
    group = current_group()
    if dead_ranks := [r for r in absentees if r in group.dead_ranks()]:
        return (
            f'{group.named(dead_ranks)} did not come and is dead: the process has ended, or its '
            'host is cut off. Look in the output of that rank for the reason.'
        )
    return (
        f'rank {own_rank} waited {timeout:g} s and {group.named(absentees)} did not come. Every '
        'rank must make this call: remove an `if rank == 0` around it, and look in the output of '
        'the missing rank for an error of its own.'
    )


def _let_all_read(peers: Peers, place: str, deadline: float) -> None:
    """Blocks rank 0, which holds the store and may end then, until every rank has read."""
    peers.come(place)
    if peers.rank != 0:
        return
    group = current_group()
    limit = group.limit('EXIT_TIMEOUT')
    if group.heartbeat is None:  # the first meeting: nobody would notice a death
        limit = min(limit, max(group.limit('SILENT_AFTER'), deadline - time.monotonic()))
    if absentees := peers.missing_at(place, time.monotonic() + limit, without_dead=True):
        # This rank has what it needs; the next meeting names who is missing.
        names = group.named(absentees)
        logger.warning('%s: %s has not read it after %g s', place, names, limit)


def begin(
    connect: Callable[[], Any], own_rank: int, ranks: int, where: str, what: str, limit: float
) -> Peers:
    """Meets all ranks for the first time: exchanges hosts and pids, starts the heartbeat.

    Collective: every rank calls it.

    Args:
        connect: makes a connection to the store; on rank 0 the store itself, if need be.
        own_rank: this process's rank.
        ranks: how many there are, at least 2.
        where: the store's address, for errors.
        what: the name of the meeting, for errors.
        limit: seconds.

    Raises:
        RankError: when a rank does not come in time, or the store cannot be reached.
    """
    group = current_group()
    client = StoreClient(connect, f'the store of rank 0 at {where}', group.dead_holder)
    peers = Peers(client, own_rank, ranks)
    listener, offer = listen() if own_rank == 0 else (None, None)
    value = socket.gethostname(), os.getpid(), offer
    try:
        values = _exchange(peers, what, value, limit, time.monotonic() + limit)
    except RankError:
        client.close(0)
        if listener is not None:
            listener.close()
        raise
    names = [f'rank {r} on {host} (pid {pid})' for r, (host, pid, _) in enumerate(values)]
    client.holder = f'{names[0]}, which holds the store,'
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        client.holder = f"the store of torchrun's agent at {where}"
    group.peers, group.names, group.store = peers, names, None
    group.hosts = [host for host, _, _ in values]
    limits = {key: group.limit(key) for key in ('CONNECT_TIMEOUT', 'DEAD_AFTER', 'SILENT_AFTER')}
    group.heartbeat = Liveness(own_rank, names, Offer(*values[0][2]), listener, limits)
    return peers


def ranks_of_host() -> list[int]:
    """The ranks on this one's host, itself included; itself alone where ranks have not met."""
    hosts, own = current_group().hosts, rank()
    return [r for r, host in enumerate(hosts) if host == hosts[own]] or [own]


def connection(what: str, limit: float) -> Peers:
    """This thread's connection to the other ranks, else the main thread's.

    Collective: every rank calls it, where ranks have not met yet.

    Args:
        what: it is for, for errors.
        limit: seconds.
    """
    if peers := thread_peers.get():
        return peers
    store, group = distributed_c10d._get_default_store(), current_group()
    if group.peers is not None and group.store in (None, store):
        group.store = store
        return group.peers
    if group.peers is not None:
        group.disconnect()
    where = "torch's default store"  # the program made the process group itself
    peers = begin(store.clone, rank(), world_size(), where, what, limit)
    group.store = store
    return peers


def connect_peers() -> Peers | None:
    """The other ranks for a background thread; None where this is the only rank.

    Collective: every rank that will use them calls it, in its main thread. They are reached over
    the main thread's connection: rank 0 holds two of each rank, this one and torch's own.
    """
    if world_size() == 1:
        return None
    return connection('first meeting', current_group().limit('TIMEOUT'))


def raise_request(name: str, peers: Peers) -> None:
    """Makes `request_is_raised` true on every rank; any rank may call it. Not a meeting."""
    peers.put(current_group().key(f'request/{name}'), '')


def request_is_raised(name: str, peers: Peers, limit: float) -> bool:
    """Whether any rank has called `raise_request` with this name.

    Raises RankError when the store has not answered after ``limit`` seconds.
    """
    key = current_group().key(f'request/{name}')
    return bool(peers.client.call(lambda store: store.check([key]), limit))


def gather(what: str, value: Any, timeout: float) -> list[Any] | None:
    """Meets all ranks and hands rank 0 alone the value of each, in rank order.

    Collective: every rank calls it. As `exchange`, for values too large for every rank to read
    from every other.
    """
    if world_size() == 1:
        return [value]
    peers, deadline = connection(what, timeout), time.monotonic() + timeout
    # Under another name: the next gathering may begin while rank 0 still reads this one.
    group = current_group()
    group.rounds['gather'] += 1
    turn = group.rounds['gather']

    def key(turn: int, of_rank: int) -> str:
        return group.key(f'brought/{turn}/{of_rank}')

    peers.put(key(turn, peers.rank), json.dumps(value))
    turns = exchange(what, turn, timeout)
    # Rank 0 has come to this one, so it has read the one before.
    peers.client.post(lambda store: store.delete_key(key(turn - 1, peers.rank)))
    if peers.rank != 0:
        return None
    keys = [key(their_turn, r) for r, their_turn in enumerate(turns)]
    return [json.loads(text) for text in peers.ask(lambda s: s.multi_get(keys), deadline)]


def agree(
    what: str,
    action: Callable[[], T],
    timeout: float,
    error_type: type[InternvlDsError] = InternvlDsError,
) -> T:
    """Runs ``action`` on this rank; returns only if it succeeded on every rank.

    Collective: every rank calls it.

    Args:
        what: the name of the meeting, the same on all ranks.
        action: this rank's part; it may raise.
        timeout: seconds to wait for the others. Where a collective in the action fails, they count
            from the beginning of the action: it has waited for a rank already.
        error_type: what the ranks raise whose own part went well.

    Returns:
        What this rank's ``action`` returned.

    Raises:
        Exception: this rank's own, as it was; or ``error_type``, naming the ranks that failed and
            why; or RankError when a rank does not come.
    """
    start = time.monotonic()
    result, failure = _attempt(action)
    if failure is not None:
        report = f'{type(failure).__name__}: {failure}'
        if is_of_collective(failure):  # on all ranks, one a little after the other
            rest = timeout - (time.monotonic() - start)
            timeout = max(rest, current_group().limit('SILENT_AFTER') / 4)
        try:
            exchange(what, report, timeout)
        except RankError as error:
            raise RankError(f'{error} Its own part failed: {first_line(failure)}') from failure
        raise failure
    reports = exchange(what, None, timeout)
    if texts := [f'rank {r}: {text}' for r, text in enumerate(reports) if text is not None]:
        raise error_type(f'{what}: {"; ".join(texts)}')
    return result  # type: ignore[return-value]


def from_rank_0(what: str, action: Callable[[], Any], timeout: float) -> Any:
    """Runs ``action`` on rank 0 alone and hands its result (anything JSON can hold) to all ranks.

    Collective: every rank calls it.

    Raises:
        Exception: rank 0's own there, and the same type with the same text on the other ranks
            where it is one of this package's errors; RankError when a rank does not come.
    """
    result, failure = _attempt(action) if rank() == 0 else (None, None)
    answer = {'result': result}
    if failure is not None:
        answer = {'error': type(failure).__name__, 'text': str(failure)}
    answer = exchange(what, answer, timeout)[0]
    if failure is not None:
        raise failure
    if 'error' in answer:
        kind = getattr(errors, answer['error'], InternvlDsError)
        is_ours = isinstance(kind, type) and issubclass(kind, InternvlDsError)
        raise (kind if is_ours else InternvlDsError)(answer['text'])
    return answer['result']


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def part_from(peers: Peers) -> None:
    """Blocks rank 0, which holds the store, until all ranks have arrived here.

    Every rank that has these peers calls it at its end; they are of no use afterwards.
    """
    group = current_group()
    try:
        place, deadline = group.key('left'), time.monotonic() + group.limit('EXIT_TIMEOUT')
        peers.come(place)
        if peers.rank == 0:
            absentees = peers.missing_at(place, deadline, without_dead=True)
            if laggards := [r for r in absentees if r not in group.dead_ranks()]:
                logger.warning('rank 0 leaves; %s is not done yet', group.named(laggards))
    except RankError as error:  # rank 0 is gone: then there is nothing left to wait for
        logger.info('rank %d ends without rank 0: %s', peers.rank, error)
    finally:
        peers.client.close(group.limit('SILENT_AFTER'))
