"""The process group: start under any launcher, limits on its collectives, orderly end."""

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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import deepspeed.comm as dist
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
from internvl_ds.dist.device import take_device
from internvl_ds.dist.excepthook import speak_on_exceptions
from internvl_ds.dist.group import current_group, drop_group
from internvl_ds.dist.network import free_port, interface_towards, why_not_reached
from internvl_ds.dist.rendezvous import begin, part_from, world_size
from internvl_ds.dist.store_client import first_line, store_answers
from internvl_ds.dist.stranded import end_at_timeout, end_if_stranded
from internvl_ds.errors import RankError

logger = logging.getLogger(__name__)

# Of the address under which torch is given the store.
_SCHEME = 'internvl-ds'


def init_distributed(
    config: CfgNode | None = None,
    *,
    launcher: str | None = None,
    local_rank: int | None = None,
) -> None:
    """Joins the launcher's process group; without a launcher, makes a group of one process.

    Collective: every rank calls it. A later call changes the limits only.

    It knows the deepspeed launcher and torchrun (RANK and its like), Open MPI, MPICH and Intel MPI
    (through mpi4py), and Slurm's srun. MASTER_ADDR and MASTER_PORT are used where they are given;
    under MPI rank 0 otherwise finds a free port and an address that all hosts reach. Without a
    launcher the process becomes rank 0 of 1.

    Args:
        config: COMM and TRAIN.TRACEBACK are read.
        launcher, local_rank: keyword-only; the original's flags, see `launchers.detect`.

    Raises:
        RankError: when mpi4py is of another MPI than the launcher, when rank 0 cannot be reached,
            or when ranks have not come after COMM.INIT_TIMEOUT seconds; they are named.
        ConfigError: for incomplete variables of a launcher, another than the flag names, or fewer
            devices than ranks on a host.
    """
    group = current_group()
    section: dict[str, Any] = {}
    if config is not None:
        group.traces = get_option(config, 'TRAIN.TRACEBACK', False)
        require_counts(config, ('COMM',))
        section = get_option(config, 'COMM', {})
        group.limits.update({key: section[key] for key in section if key != 'INTERFACE'})
    if dist.is_initialized():
        return
    settings = {**default_config().COMM, **section}
    speak_on_exceptions(None)
    launch = launchers.detect(os.environ, launcher, local_rank)
    speak_on_exceptions(launch.rank, afterwards=_end_while_connecting)
    own_rank, on_host, master = launch.local_rank or 0, None, launch.master
    end_job = None
    if launch.by in (launchers.OPEN_MPI, launchers.MPICH):
        communicator = mpi.world(launch)
        end_job = functools.partial(mpi.abort, communicator, settings['ABORT_TIMEOUT'])
        speak_on_exceptions(launch.rank, end_job)
        own_rank, on_host = mpi.local_rank(communicator)
        one_host = on_host == launch.world_size
        master = master or mpi.agree_on_master(
            communicator, one_host, settings['INTERFACE'], settings['CONNECT_TIMEOUT']
        )
    elif launch.by == launchers.SINGLE:
        master = master or ('127.0.0.1', free_port())
    if master is not None:
        _set_master(*master, settings['INTERFACE'])
    device = str(take_device(own_rank))  # which DeepSpeed calls the local rank
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=device)
    if 'OMPI_COMM_WORLD_LOCAL_RANK' in os.environ:  # which DeepSpeed compares with it
        os.environ['OMPI_COMM_WORLD_LOCAL_RANK'] = device
    _join(launch, settings['INIT_TIMEOUT'])
    patience = mpi.PATIENCE if launch.by == launchers.OPEN_MPI else 0.0
    speak_on_exceptions(launch.rank, end_job, patience, joined=True)
    end_if_stranded(functools.partial(_end, 1))
    end_at_timeout(functools.partial(_end, 1))
    group.timeout = settings['TIMEOUT']
    limit_collectives()
    sharing = '' if on_host is None else f', {on_host} on its host'
    where = f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}'
    group.start = f'started by {launch.by}: {launch.world_size} ranks{sharing}, rank 0 at {where}'
    if launch.rank == 0:
        logger.info(group.start)


def _set_master(address: str, port: int, interface: str) -> None:
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    # gloo takes what the host's name resolves to, on many systems a loopback address
    if route := interface or interface_towards(address):
        os.environ.setdefault('GLOO_SOCKET_IFNAME', route)
    if interface:  # NCCL finds its own: the fastest, and all of several
        os.environ.setdefault('NCCL_SOCKET_IFNAME', interface)


def _join(launch: launchers.Launch, limit: float) -> None:
    deadline = time.monotonic() + limit
    address, port = os.environ.get('MASTER_ADDR', ''), int(os.environ.get('MASTER_PORT') or 0)
    where, group = f'{address}:{port}', current_group()

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
        if launch.world_size > 1 and port:
            # All meet before torch's own start, which would not say who is missing.
            begin(connect, launch.rank, launch.world_size, where, 'start', limit)
            with contextlib.suppress(RuntimeError):  # torch knows it from an earlier start
                register_rendezvous_handler(_SCHEME, _hand_over)
        seconds = max(group.limit('SILENT_AFTER'), deadline - time.monotonic())
        with _store_answers(seconds):
            dist.init_distributed(
                auto_mpi_discovery=False,
                verbose=False,
                timeout=timedelta(seconds=seconds),
                init_method=f'{_SCHEME}://' if group.peers else None,
            )
    except (RuntimeError, ValueError) as error:
        group.disconnect()
        reason = why_not_reached(address, port, group.limit('CONNECT_TIMEOUT')) if port else None
        raise RankError(
            f'rank {launch.rank} of {launch.world_size} on {socket.gethostname()} could not join '
            f'the others at {where} within {limit:g} s (COMM.INIT_TIMEOUT): {reason or ""}'
            f'{"; " if reason else ""}{first_line(error)}'
        ) from error


def _hand_over(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Any, int, int]]:
    """Hands torch the store of the first meeting: its own rendezvous would wait twice as long.

    Under a prefix, because a store may outlive a process group and the addresses in it.
    """
    group = current_group()
    peers = group.peers
    assert peers is not None
    store = peers.client.call(lambda store: store.clone(), timeout.total_seconds())
    yield PrefixStore(group.key('torch'), store), peers.rank, peers.world_size


@contextmanager
def making_groups() -> Iterator[None]:
    """Bounds the making of process groups by COMM.TIMEOUT, and their collectives from the start.

    torch waits for half an hour where a group is made without a limit, and for ever where the
    process with the store stands still.
    """
    group = current_group()
    names = ('default_pg_timeout', 'default_pg_nccl_timeout') if group.timeout is not None else ()
    before = {name: getattr(distributed_c10d, name) for name in names}
    for name in names:
        setattr(distributed_c10d, name, timedelta(seconds=group.timeout or 0))
    try:
        with _store_answers(group.limit('TIMEOUT')):
            yield
    finally:
        for name, value in before.items():
            setattr(distributed_c10d, name, value)


def _store_answers(limit: float) -> AbstractContextManager[None]:
    peers, heartbeat = current_group().peers, current_group().heartbeat
    if peers is None or heartbeat is None:
        return contextlib.nullcontext()
    port = int(os.environ.get('MASTER_PORT') or 0)
    return store_answers(peers.client, port, limit, heartbeat.describe_gone)


def limit_collectives(config: CfgNode | None = None) -> None:
    """Bounds every collective of all existing process groups, DeepSpeed's included.

    Groups that are made later need it again. DEEPSPEED_TIMEOUT reaches the first one only. Groups
    that the program made itself, with a limit of its own, keep it unless COMM.TIMEOUT is set.

    Args:
        config: COMM.TIMEOUT (seconds) is read; None for what was said last.
    """
    group, default = current_group(), default_of('COMM.TIMEOUT')
    seconds = get_option(config, 'COMM.TIMEOUT', default) if config is not None else group.timeout
    if group.timeout is not None or seconds != default:
        group.timeout = seconds
    if group.timeout is not None:
        _set_limit(group.timeout)


def _set_limit(seconds: float) -> None:
    # Published since torch 2.14.
    set_timeout = getattr(torch_dist, 'set_timeout', None) or distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map) if torch_dist.is_initialized() else ():
        set_timeout(timedelta(seconds=seconds), group)


@contextmanager
def collectives_within(seconds: float) -> Iterator[None]:
    """Raises the limit of collectives to this: ranks read files between them.

    Collective: every rank calls it. A group that the program made itself keeps its limit.
    """
    timeout = current_group().timeout
    longer = timeout is not None and seconds > timeout
    if longer:
        _set_limit(seconds)
    try:
        yield
    finally:
        if longer:
            limit_collectives()


def shutdown() -> None:
    """Leaves the process group; rank 0 last, which holds the store.

    Collective: every rank calls it. It is safe to call twice, and without a process group.

    Raises:
        InternvlDsError: when a background save failed; the group is left all the same.
    """
    group = current_group()
    try:
        for callback in reversed(group.callbacks):
            callback()
    finally:
        if world_size() > 1 and group.peers is not None:
            part_from(group.peers)
        drop_group()
        if dist.is_initialized():
            # DeepSpeed's own call also lets go of the groups that it keeps; left to the
            # interpreter's exit, their threads aborted 1 of some 400 processes after all work.
            dist.destroy_process_group()
        elif torch_dist.is_initialized():
            torch_dist.destroy_process_group()


def before_shutdown(callback: Callable[[], None]) -> None:
    """Registers a function that `shutdown` calls once, before the process group ends."""
    callbacks = current_group().callbacks
    if callback not in callbacks:
        callbacks.append(callback)


def leave(status: int = 0) -> NoReturn:
    """Ends a process after its work, through `shutdown`.

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
