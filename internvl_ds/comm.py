"""Talking to other ranks: start, orderly end, reduce_tensor, and named meetings with a time limit.

A meeting (`exchange`, `agree`) goes through the process group's store, not through a collective of
the training group, so that a rank that does not come is named instead of waited for.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

import deepspeed.comm as dist
import torch
import torch.distributed as torch_dist
from torch.distributed import distributed_c10d
from yacs.config import CfgNode

from internvl_ds import launchers, mpi
from internvl_ds.config import default_config, get_option
from internvl_ds.errors import InternvlDsError, RankError
from internvl_ds.last_words import speak_on_exceptions
from internvl_ds.liveness import Liveness
from internvl_ds.network import interface_towards

T = TypeVar('T')

logger = logging.getLogger(__name__)

# Seconds that rank 0 waits at the end for ranks that are still busy.
_LAST_WAIT = 60

# Seconds within which a collective must end, as `limit_collectives` was last told.
_limit: float | None = None

# This rank's signs of life; None where it is the only one.
_liveness: Liveness | None = None

# What was found at the start: see `how_started`.
_start = ''

# How many meetings of each name this rank has been through: part of the key that they meet under.
_rounds: Counter[str] = Counter()

# What has to end before the process group does: see `before_shutdown`.
_before_shutdown: list[Callable[[], None]] = []

# What a background thread meets the others through: see `background_meetings`.
_thread = threading.local()


def init_distributed(config: CfgNode | None = None) -> None:
    """Joins the process group that the launcher announced; a process of its own without one.

    Every rank must call it, once or more often. It knows the deepspeed launcher and torchrun (RANK
    and its like), Open MPI, MPICH and Intel MPI (through mpi4py), and Slurm's srun. MASTER_ADDR and
    MASTER_PORT are used where they are given; under MPI rank 0 otherwise finds a free port and an
    address that all hosts reach. Without a launcher the process becomes rank 0 of 1.

    Args:
        config: COMM.TIMEOUT, COMM.INIT_TIMEOUT (seconds) and COMM.INTERFACE are read.

    Raises:
        RankError: when mpi4py is of another MPI than the launcher, or rank 0 cannot be reached.
        ConfigError: for incomplete variables of a launcher.
    """
    global _limit, _liveness, _start
    if dist.is_initialized():
        return
    settings = {
        **default_config().COMM,
        **(get_option(config, 'COMM', {}) if config is not None else {}),
    }
    launch = launchers.detect(os.environ)
    local_rank, on_host, master = launch.local_rank or 0, None, launch.master
    end_job = None
    if launch.by in (launchers.OPEN_MPI, launchers.MPICH):
        communicator = mpi.world(launch)
        end_job = functools.partial(mpi.abort, communicator)
        speak_on_exceptions(launch.rank, afterwards=end_job)
        local_rank, on_host = mpi.local_rank(communicator)
        one_host = on_host == launch.world_size
        master = master or mpi.agree_on_master(communicator, one_host, settings['INTERFACE'])
    elif launch.by == launchers.SINGLE:
        master = master or ('127.0.0.1', free_port())
    if master is not None:
        os.environ.update(MASTER_ADDR=master[0], MASTER_PORT=str(master[1]))
        # gloo takes what the host's name resolves to, on many systems a loopback address
        interface = settings['INTERFACE'] or interface_towards(master[0])
        for variable in ('GLOO_SOCKET_IFNAME', 'NCCL_SOCKET_IFNAME'):
            if interface:
                os.environ.setdefault(variable, interface)
    os.environ.update(
        RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(local_rank)
    )
    _join(launch, settings['INIT_TIMEOUT'])
    silent = None
    if launch.world_size > 1:
        store = distributed_c10d._get_default_store().clone()
        _liveness = Liveness(store, launch.rank, launch.world_size)
        silent = _liveness.describe_silent
    speak_on_exceptions(launch.rank, silent, end_job)
    _limit = settings['TIMEOUT']
    limit_collectives()
    sharing = '' if on_host is None else f', {on_host} on its host'
    where = f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}'
    _start = f'started by {launch.by}: {launch.world_size} ranks{sharing}, rank 0 at {where}'
    if launch.rank == 0:
        logger.info(_start)


def how_started() -> str:
    """What `init_distributed` found and decided, in one line; '' before it."""
    return _start


def _join(launch: launchers.Launch, limit: float) -> None:
    try:
        dist.init_distributed(
            auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=limit)
        )
    except (RuntimeError, ValueError) as error:
        where = f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}'
        raise RankError(
            f'rank {launch.rank} of {launch.world_size} on {socket.gethostname()} could not join '
            f'the others at {where} within {limit:g} s (COMM.INIT_TIMEOUT): {error}'
        ) from error


def limit_collectives(config: CfgNode | None = None) -> None:
    """Bounds every collective of every process group that there is, those of DeepSpeed too.

    Groups that are made later need it again. DEEPSPEED_TIMEOUT reaches the first one only. Groups
    that the program made itself, with a limit of its own, keep it unless COMM.TIMEOUT is set.

    Args:
        config: COMM.TIMEOUT (seconds) is read; None for what was said last.
    """
    global _limit
    default = default_config().COMM.TIMEOUT
    seconds = get_option(config, 'COMM.TIMEOUT', default) if config is not None else _limit
    if _limit is not None or seconds != default:
        _limit = seconds
    if _limit is None or not torch_dist.is_initialized():
        return
    for group in list(distributed_c10d._world.pg_map):
        torch_dist.set_timeout(timedelta(seconds=_limit), group)


def shutdown() -> None:
    """Leaves the process group, rank 0 last: it holds the store that the others may still read.

    Every rank calls it when its work is done; safe to call twice, and without a process group.

    Raises:
        InternvlDsError: when a background save failed; the group is left all the same.
    """
    try:
        for action in _before_shutdown:
            action()
    finally:
        _leave_group()


def before_shutdown(action: Callable[[], None]) -> None:
    """Has `shutdown` call ``action`` while the process group is still there."""
    _before_shutdown.append(action)


def _leave_group() -> None:
    if _liveness is not None:
        _liveness.stop()
    if world_size() > 1:
        _wait_for_the_others()
    _rounds.clear()
    if dist.is_initialized():
        # DeepSpeed's own call also lets go of the groups that it keeps; left to the interpreter's
        # exit, their threads aborted 1 of some 400 processes after all work was done.
        dist.destroy_process_group()
    elif torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def part_from(peers: Peers) -> None:
    """Has rank 0 wait, where `shutdown` is not called, until the others need its store no more.

    Every rank that has these peers calls it at its end.
    """
    with background_meetings(peers):
        try:
            _wait_for_the_others()
        except RuntimeError as error:  # rank 0 is gone: then there is nothing left to wait for
            logger.info('rank %d ends without rank 0: %s', rank(), error)


def _wait_for_the_others() -> None:
    store = _store()
    keys = [f'internvl_ds/left/{r}' for r in range(world_size())]
    store.set(keys[rank()], '')
    if rank() == 0:
        try:
            store.wait(keys, timedelta(seconds=_LAST_WAIT))
        except RuntimeError:
            late = [r for r, key in enumerate(keys) if not store.check([key])]
            logger.warning('rank 0 leaves; rank %s is not done yet', _listed(late))


def leave(status: int = 0) -> NoReturn:
    """Ends a process whose work is done, after `shutdown`.

    Exit functions run and output is flushed, but the interpreter is not torn down: C++ threads of
    torch and DeepSpeed can abort that, and a finished job would look failed.
    """
    shutdown()
    atexit._run_exitfuncs()
    mpi.finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def free_port() -> int:
    """A TCP port on the loopback interface that was free when asked."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])


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


def reduce_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Averages a tensor over all ranks. Every rank must call it, with the same shape and dtype.

    Args:
        tensor: any shape and dtype, on the engine's device; left untouched.

    Returns:
        A new tensor of the same shape: the mean over ranks; float32 for integer input.
    """
    total = tensor.detach().clone()
    if not total.is_floating_point() and not total.is_complex():
        total = total.to(torch.float32)
    if torch_dist.is_initialized():
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total / world_size()


def reduce_tensors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Averages several tensors over all ranks in one collective.

    Args:
        tensors: real, of any shapes, on one device; as many and the same shapes on every rank.

    Returns:
        New tensors of the same shapes: the means, computed in float32 and returned so for integers,
        in their own dtype for floating point.
    """
    if not tensors:
        return []
    flat = torch.cat([t.detach().reshape(-1).to(torch.float32) for t in tensors])
    means = reduce_tensor(flat).split([t.numel() for t in tensors])
    return [
        mean.view(t.shape).to(t.dtype if t.is_floating_point() else torch.float32)
        for mean, t in zip(means, tensors, strict=True)
    ]


def reduce_dict(values: Mapping[str, torch.Tensor | float]) -> dict[str, torch.Tensor]:
    """Averages several numbers over all ranks in one collective.

    Args:
        values: name -> number or 0-dim tensor; the same names on every rank.

    Returns:
        Name -> mean, 0-dim float32, on the device of the first tensor (or the CPU).
    """
    tensors = [v for v in values.values() if isinstance(v, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device('cpu')
    numbers = [torch.as_tensor(v, dtype=torch.float32, device=device) for v in values.values()]
    return dict(zip(values, reduce_tensors(numbers), strict=True))


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
        what: the name of the meeting, the same on all ranks; it stands in the error.
        value: anything JSON can hold.
        timeout: seconds to wait for the others.

    Raises:
        RankError: when a rank does not come in time; it names the ranks that are missing.
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
