"""A job of two CPU ranks on rank 0's host, of which one is killed: the other must name it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

from deepspeed.accelerator import get_accelerator

from internvl_ds.dist.network import free_port
from internvl_ds.dist.rendezvous import rank
from internvl_ds.tools.selftest.row import ABSENT, Row, judged

# What a launcher sets for its ranks, and these are another job's.
_OF_LAUNCHERS = re.compile(
    r'(RANK|LOCAL_|WORLD_SIZE|GROUP_|ROLE_|MASTER_|TORCHELASTIC|OMPI_|PMI|PMIX|MPI|HYDRA|SLURM_)'
)
LIMIT = 120.0  # seconds, the start of two Pythons included
_KILLED = 1
# Another program took the port while the two Pythons started.
_TRIES, _PORT_TAKEN = 3, 'failed to listen'


def killed_row() -> Row:
    """Starts the job and reads its last words; ranks other than 0 have nothing to do."""
    name = 'a killed rank'
    if get_accelerator().device_name() != 'cpu':
        # DeepSpeed would first compile an op for the ranks of this job.
        return Row(name, ABSENT, 'tried where ranks compute on CPUs')
    if rank() != 0:
        return Row(name, ABSENT, '')
    start = time.monotonic()
    for _ in range(_TRIES):
        status, text = _last_words()
        if _PORT_TAKEN not in text:
            break
    seconds = time.monotonic() - start
    faults = []
    if status == 0:
        faults.append('the other rank ended with exit status 0')
    if f'rank {_KILLED}' not in text:
        faults.append(f'the other rank did not name it in {seconds:.0f} s: {text[-200:]!r}')
    named = text.strip().splitlines()[-1:] or ['']
    return judged(name, faults, f'exit status {status}: {named[0][:120]}')


def _last_words() -> tuple[int, str]:
    """The exit status and stderr of the rank that is left."""
    env = {k: v for k, v in os.environ.items() if not _OF_LAUNCHERS.match(k)}
    env |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'WORLD_SIZE': '2'}
    env |= {'DS_ACCELERATOR': 'cpu', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', __name__]
    processes = [
        subprocess.Popen(
            command, env={**env, 'RANK': str(r), 'LOCAL_RANK': str(r)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors='replace',
        )
        for r in (0, _KILLED)
    ]  # fmt: skip
    try:
        _, text = processes[0].communicate(timeout=LIMIT)
        return processes[0].returncode, text
    except subprocess.TimeoutExpired:
        return 0, f'it still waited after {LIMIT:g} s'
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _train_until_killed() -> None:
    import deepspeed.comm as dist
    import torch

    from internvl_ds.dist.process_group import init_distributed

    init_distributed()
    while True:
        dist.all_reduce(torch.ones(1))
        if rank() == _KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == '__main__':
    _train_until_killed()
