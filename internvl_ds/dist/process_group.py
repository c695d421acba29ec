"""The process group: start under any launcher, limits, orderly end; and averages over all ranks."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import deepspeed.comm as dist
import torch
import torch.distributed as torch_dist
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    TCPStore,
    distributed_c10d,
    register_rendezvous_handler,
)
from yacs.config import CfgNode

from internvl_ds.config.counts import require_counts
from internvl_ds.config.tree import default_config, default_of, get_option
from internvl_ds.dist import launchers, mpi
from internvl_ds.dist.excepthook import speak_on_exceptions, trace_all
from internvl_ds.dist.network import interface_towards, why_not_reached
from internvl_ds.dist.peers import (
    current_group,
    describe_gone,
    describe_silent,
    key_of,
    limit_of,
    may_speak,
    set_limits,
    world_size,
)
from internvl_ds.dist.rendezvous import begin, forget_meetings, leave_meetings
from internvl_ds.dist.store_client import first_line, store_answers
from internvl_ds.errors import RankError

logger = logging.getLogger(__name__)

# Of the address under which torch is given the store.
_SCHEME = 'internvl-ds'

# Seconds within which a collective must end, as `limit_collectives` was last told.
_limit: float | None = None

# What was found at the start: see `how_started`.
_start = ''

# What has to end before the process group does: see `before_shutdown`.
_before_shutdown: list[Callable[[], None]] = []


def init_distributed(config: CfgNode | None = None) -> None:
    """Joins the process group that the launcher announced; a process of its own without one.

    Every rank must call it, once or more often. It knows the deepspeed launcher and torchrun (RANK
    and its like), Open MPI, MPICH and Intel MPI (through mpi4py), and Slurm's srun. MASTER_ADDR and
    MASTER_PORT are used where they are given; under MPI rank 0 otherwise finds a free port and an
    address that all hosts reach. Without a launcher the process becomes rank 0 of 1.

    Args:
        config: COMM and TRAIN.TRACEBACK are read.

    Raises:
        RankError: when mpi4py is of another MPI than the launcher, when rank 0 cannot be reached,
            or when ranks have not come after COMM.INIT_TIMEOUT seconds; they are named.
        ConfigError: for incomplete variables of a launcher.
    """
    global _limit, _start
    given = get_option(config, 'COMM', {}) if config is not None else {}
    if config is not None:
        trace_all(get_option(config, 'TRAIN.TRACEBACK', False))
        require_counts(config, ('COMM',))
        set_limits({key: value for key, value in given.items() if key != 'INTERFACE'})
    if dist.is_initialized():
        return
    settings = {**default_config().COMM, **given}
    speak_on_exceptions(None)
    launch = launchers.detect(os.environ)
    speak_on_exceptions(launch.rank, afterwards=_end_while_connecting)
    local_rank, on_host, master = launch.local_rank or 0, None, launch.master
    end_job = None
    if launch.by in (launchers.OPEN_MPI, launchers.MPICH):
        communicator = mpi.world(launch)
        end_job = functools.partial(mpi.abort, communicator, settings['ABORT_TIMEOUT'])
        speak_on_exceptions(launch.rank, afterwards=end_job)
        local_rank, on_host = mpi.local_rank(communicator)
        one_host = on_host == launch.world_size
        master = master or mpi.agree_on_master(
            communicator, one_host, settings['INTERFACE'], settings['CONNECT_TIMEOUT']
        )
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
    patience = mpi.PATIENCE if launch.by == launchers.OPEN_MPI else 0.0
    speak_on_exceptions(launch.rank, describe_silent, may_speak, end_job, patience)
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
    deadline = time.monotonic() + limit
    address, port = os.environ.get('MASTER_ADDR', ''), int(os.environ.get('MASTER_PORT') or 0)
    where = f'{address}:{port}'

    def connect() -> Any:
        serves = launch.rank == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
        return TCPStore(
            address,
            port,
            is_master=serves,
            timeout=timedelta(seconds=limit),
            wait_for_workers=False,
            multi_tenant=True,
        )

    try:
        client = None
        if launch.world_size > 1 and port:
            # All meet before torch's own start, which would not say who is missing.
            group = begin(connect, launch.rank, launch.world_size, where, 'start', limit)
            client = group.peers.client
            _make_known()
        left = max(limit_of('SILENT_AFTER'), deadline - time.monotonic())
        with store_answers(client, port, left, describe_gone):
            dist.init_distributed(
                auto_mpi_discovery=False,
                verbose=False,
                timeout=timedelta(seconds=left),
                init_method=f'{_SCHEME}://' if client is not None else None,
            )
    except (RuntimeError, ValueError) as error:
        forget_meetings()
        reason = why_not_reached(address, port, limit_of('CONNECT_TIMEOUT')) if port else None
        raise RankError(
            f'rank {launch.rank} of {launch.world_size} on {socket.gethostname()} could not join '
            f'the others at {where} within {limit:g} s (COMM.INIT_TIMEOUT): {reason or ""}'
            f'{"; " if reason else ""}{first_line(error)}'
        ) from error


def _hand_over(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Any, int, int]]:
    """Gives torch the store where all have met: its own way to it tries twice, each time as long.

    Under a prefix, because a store may outlive a process group and the addresses in it.
    """
    group = current_group()
    assert group is not None
    peers = group.peers
    store = peers.client.call(lambda store: store.clone(), timeout.total_seconds())
    yield PrefixStore(key_of('torch'), store), peers.rank, peers.world_size


@functools.cache
def _make_known() -> None:
    register_rendezvous_handler(_SCHEME, _hand_over)


@contextmanager
def making_groups() -> Iterator[None]:
    """Bounds the making of process groups by COMM.TIMEOUT, and their collectives from the start.

    torch waits for half an hour where a group is made without a limit, and for ever where the
    process with the store stands still.
    """
    names = ('default_pg_timeout', 'default_pg_nccl_timeout') if _limit is not None else ()
    before = {name: getattr(distributed_c10d, name) for name in names}
    for name in names:
        setattr(distributed_c10d, name, timedelta(seconds=_limit or 0))
    group, port = current_group(), int(os.environ.get('MASTER_PORT') or 0)
    client = group.peers.client if group is not None else None
    try:
        with store_answers(client, port, limit_of('TIMEOUT'), describe_gone):
            yield
    finally:
        for name, value in before.items():
            setattr(distributed_c10d, name, value)


def limit_collectives(config: CfgNode | None = None) -> None:
    """Bounds every collective of every process group that there is, those of DeepSpeed too.

    Groups that are made later need it again. DEEPSPEED_TIMEOUT reaches the first one only. Groups
    that the program made itself, with a limit of its own, keep it unless COMM.TIMEOUT is set.

    Args:
        config: COMM.TIMEOUT (seconds) is read; None for what was said last.
    """
    global _limit
    default = default_of('COMM.TIMEOUT')
    seconds = get_option(config, 'COMM.TIMEOUT', default) if config is not None else _limit
    if _limit is not None or seconds != default:
        _limit = seconds
    if _limit is not None and torch_dist.is_initialized():
        _set_limit(_limit)


def _set_limit(seconds: float) -> None:
    for group in list(distributed_c10d._world.pg_map):
        torch_dist.set_timeout(timedelta(seconds=seconds), group)


@contextmanager
def collectives_within(seconds: float) -> Iterator[None]:
    """Lets collectives take this long, where COMM.TIMEOUT is less: ranks read files in between.

    Every rank must call it. Groups that the program made itself, with a limit of its own, keep it.
    """
    longer = _limit is not None and torch_dist.is_initialized() and seconds > _limit
    if longer:
        _set_limit(seconds)
    try:
        yield
    finally:
        if longer:
            limit_collectives()


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
    leave_meetings()
    if dist.is_initialized():
        # DeepSpeed's own call also lets go of the groups that it keeps; left to the interpreter's
        # exit, their threads aborted 1 of some 400 processes after all work was done.
        dist.destroy_process_group()
    elif torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def leave(status: int = 0) -> NoReturn:
    """Ends a process whose work is done, after `shutdown`.

    Exit functions run and output is flushed, but the interpreter is not torn down: C++ threads of
    torch and DeepSpeed can abort that, and a finished job would look failed.
    """
    shutdown()
    _end(status)


def _end_while_connecting() -> None:
    """torch aborts a process where a connection fails while the interpreter is torn down."""
    if any(thread.name == 'store' for thread in threading.enumerate()):
        _end(1)


def _end(status: int) -> NoReturn:
    atexit._run_exitfuncs()
    mpi.finalize()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the terminal is gone
            stream.flush()
    os._exit(status)


def free_port() -> int:
    """A TCP port on the loopback interface that was free when asked."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])


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
