"""Starting and ending under mpirun: agreeing on an address, aborting the job, finalizing."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from typing import Any

from internvl_ds.dist.launchers import Launch
from internvl_ds.dist.network import free_port, own_addresses, why_not_reached
from internvl_ds.errors import RankError

logger = logging.getLogger(__name__)

# Seconds that mpirun gets to pass on what was printed: it drops that when a job is aborted.
_LAST_WORDS = 1.0
# Seconds by which the ranks' aborts are apart, at most: where all fail at a time, one is enough to
# end the others, and Open MPI's daemons (5.0.11) have hung over four at once on two hosts.
_APART = 4
# Seconds that Open MPI's daemons need to find out that their link is cut. Where a rank says a word
# meanwhile its daemon, on the far side, waits a quarter of an hour for TCP to bring it home.
PATIENCE = 6.0


def world(launch: Launch) -> Any:
    """MPI's communicator of all ranks; the first call initializes MPI.

    Raises:
        RankError: when mpi4py's MPI is not the one of the launcher, or is not there.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RankError(
            f'{launch.by} started this process, but mpi4py cannot be used: {error}. Install '
            'internvl_ds[mpi], or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT'
        ) from error
    size = MPI.COMM_WORLD.Get_size()
    if size != launch.world_size:
        library = MPI.Get_library_version().splitlines()[0].strip()
        raise RankError(
            f'{launch.by} started {launch.world_size} ranks, but the MPI library that mpi4py found '
            f'({library}) sees {size}: it is of another MPI. Use the mpirun of the same '
            'environment, or point MPI4PY_LIBMPI at the library of the one that runs'
        )
    return MPI.COMM_WORLD


def local_rank(communicator: Any) -> tuple[int, int]:
    """This process's rank on its host (ranks that share memory), and their number."""
    from mpi4py import MPI

    shared = communicator.Split_type(MPI.COMM_TYPE_SHARED)
    place = shared.Get_rank(), shared.Get_size()
    shared.Free()
    return place


def agree_on_master(
    communicator: Any, one_host: bool, interface: str, limit: float
) -> tuple[str, int]:
    """An address of rank 0 that all others reach, and a port that is free there.

    Collective: every rank calls it.

    Args:
        communicator: of all ranks.
        one_host: whether all ranks share a host: then it is the loopback address.
        interface: the only network interface to use; '' for any.
        limit: seconds for one try to reach an address.

    Raises:
        RankError: on all ranks, when no address of rank 0 is reached by all.
    """
    is_rank_0 = communicator.Get_rank() == 0
    with socket.socket() as listener:
        offer = None
        if is_rank_0:
            addresses = ['127.0.0.1'] if one_host else own_addresses(interface)
            own = '127.0.0.1' if one_host else ''
            try:  # a port that no outgoing connection takes before the store listens there
                listener.bind((own, free_port()))
            except OSError:  # taken on another address than loopback
                listener.bind((own, 0))
            listener.listen(communicator.Get_size())
            offer = addresses, listener.getsockname()[1], socket.gethostname()
        addresses, port, host = communicator.bcast(offer)
        answers = [a for a in addresses if is_rank_0 or not why_not_reached(a, port, limit)]
        reports = communicator.allgather((answers, socket.gethostname()))
    common = [a for a in addresses if all(a in answers for answers, _ in reports)]
    if common:
        return common[0], port
    hosts = sorted({host for answers, host in reports if not answers})
    raise RankError(
        f'no address of rank 0 ({host}: {", ".join(addresses) or "none"}) is reached from every '
        f'host; {", ".join(hosts) or "each reaches another one"} cannot. Open the network between '
        'them, or name the interface that they share in COMM.INTERFACE, or set MASTER_ADDR and '
        'MASTER_PORT'
    )


def abort(communicator: Any, limit: int) -> None:
    """Aborts all ranks of the job: after an exception on one, MPI_Finalize would hang.

    It may take ``limit`` whole seconds.
    """
    time.sleep(_LAST_WORDS + min(communicator.Get_rank(), _APART))
    # MPICH's waits for its daemon, which may be cut off: then the kernel ends this process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limit)
    communicator.Abort(1)


def finalize() -> None:
    """Finalizes MPI if it was initialized, so that mpirun sees an orderly end."""
    module = sys.modules.get('mpi4py.MPI')
    if module is not None and module.Is_initialized() and not module.Is_finalized():
        module.Finalize()
