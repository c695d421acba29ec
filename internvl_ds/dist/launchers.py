"""Detects the launcher of this process from its environment. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from internvl_ds.errors import ConfigError

SINGLE, ENVIRONMENT, OPEN_MPI, MPICH, SLURM = (
    'nobody', 'deepspeed or torchrun', 'Open MPI', 'MPICH or Intel MPI', 'Slurm',
)  # fmt: skip

# Slurm's jobs get a port from their id, so that two of them on one host do not meet.
_PORTS = range(20000, 32000)


@dataclass(frozen=True)
class Launch:
    """The rank, world size and address that a launcher set.

    Attributes:
        by: one of this module's constants.
        rank, world_size: of all processes.
        local_rank: of those on this host; None where it is to be found out.
        master: host name or address, and port, of rank 0; None where they are to be agreed on.
    """

    by: str
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0
    master: tuple[str, int] | None = None


def detect(
    environ: Mapping[str, str], launcher: str | None = None, local_rank: int | None = None
) -> Launch:
    """Reads RANK, WORLD_SIZE and so on, else the variables of mpirun, mpiexec.hydra or srun.

    Args:
        environ: the environment of this process.
        launcher: the original's flag. 'slurm' takes what srun set, whatever else is there;
            'pytorch' takes RANK and its like; None finds out.
        local_rank: the original's flag, for those who set RANK and no LOCAL_RANK.

    Raises:
        ConfigError: for variables that are incomplete or no numbers, and for another launcher than
            the flag names; they are named.
    """
    if launcher == 'slurm':
        if not _is_step(environ):
            raise ConfigError(
                '--launcher slurm: srun did not start this process (SLURM_STEP_NUM_TASKS and '
                'SLURM_PROCID are not both set): start it with srun, or leave the flag out'
            )
        return _slurm(environ)
    found = _detect(environ, local_rank)
    if found.world_size > 1 and found.master is not None and not found.master[1]:
        raise ConfigError(
            'MASTER_PORT is 0, which each rank would read as another port: name a free one '
            '(torchrun: --master-port, or --standalone on one host)'
        )
    if launcher == 'pytorch' and found.by not in (ENVIRONMENT, SINGLE):
        raise ConfigError(
            f'--launcher pytorch: {found.by} started this process, and RANK and WORLD_SIZE are not '
            f'set: start it with torchrun, or leave the flag out and {found.by} will do'
        )
    return found


def _detect(environ: Mapping[str, str], local_rank: int | None) -> Launch:
    if local_rank is not None:
        environ = {'LOCAL_RANK': str(local_rank), **environ}
    if 'RANK' in environ and 'WORLD_SIZE' in environ:
        rank, size = _number(environ, 'RANK'), _number(environ, 'WORLD_SIZE')
        if rank >= size:
            raise ConfigError(f'RANK is {rank} and WORLD_SIZE is {size}: ranks are counted from 0')
        # a guess would put all ranks of a host on one GPU
        local = 0 if size == 1 and 'LOCAL_RANK' not in environ else _number(environ, 'LOCAL_RANK')
        return Launch(ENVIRONMENT, rank, size, local, _master_in(environ))
    for by, prefix in ((OPEN_MPI, 'OMPI_COMM_WORLD'), (MPICH, 'PMI')):
        if f'{prefix}_SIZE' in environ:
            rank, size = _number(environ, f'{prefix}_RANK'), _number(environ, f'{prefix}_SIZE')
            return Launch(by, rank, size, None, _master_in(environ))
    if _is_step(environ):
        return _slurm(environ)
    return Launch(SINGLE, local_rank=local_rank or 0, master=_master_in(environ))


def expand_nodes(text: str) -> list[str]:
    """The hosts of a Slurm node list such as ``gpu[01-03,7],login``; ConfigError if it is none."""
    parts = re.findall(r'(?:[^,\[]|\[[^\]]*\])+', text)
    hosts = [host for part in parts for host in _expand(part)]
    if not hosts or text.count('[') != text.count(']'):
        raise ConfigError(f'{text!r} is no Slurm node list')
    return hosts


def expand_tasks(text: str) -> list[int]:
    """Tasks of each host, from Slurm's ``8(x2),4``; ConfigError for what is no such list."""
    tasks: list[int] = []
    for part in text.split(','):
        match = re.fullmatch(r'(\d+)(?:\(x(\d+)\))?', part.strip())
        if match is None:
            raise ConfigError(f'{text!r} is no list of tasks per node')
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _expand(part: str) -> list[str]:
    match = re.search(r'\[([^\]]*)\]', part)
    if match is None:
        return [part.strip()]
    hosts = []
    for item in match[1].split(','):
        first, dash, last = item.partition('-')
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(f'{part!r} is no Slurm node list: {item!r} in it is no range')
        before, after = part[: match.start()], part[match.end() :]
        for number in range(int(first), int(last or first) + 1):
            hosts += _expand(f'{before}{number:0{len(first)}d}{after}')
    return hosts


def _is_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this. A batch script has SLURM_PROCID too, and is no rank."""
    return 'SLURM_STEP_NUM_TASKS' in environ and 'SLURM_PROCID' in environ


def _slurm(environ: Mapping[str, str]) -> Launch:
    size = _number(environ, 'SLURM_STEP_NUM_TASKS')
    per_node = environ.get('SLURM_STEP_TASKS_PER_NODE', str(size))
    if sum(expand_tasks(per_node)) != size:
        raise ConfigError(
            f'SLURM_STEP_NUM_TASKS is {size}, and SLURM_STEP_TASKS_PER_NODE is {per_node!r}: '
            'one of them is not of this step; do not set them yourself'
        )
    return Launch(
        SLURM,
        _number(environ, 'SLURM_PROCID'),
        size,
        _number(environ, 'SLURM_LOCALID'),
        _master_in(environ) or _slurm_master(environ),
    )


def _slurm_master(environ: Mapping[str, str]) -> tuple[str, int]:
    nodes = environ.get('SLURM_STEP_NODELIST') or environ.get('SLURM_JOB_NODELIST')
    if not nodes:
        raise ConfigError('srun started this process, but SLURM_STEP_NODELIST is not set')
    job, step = (environ.get(key, '0') for key in ('SLURM_JOB_ID', 'SLURM_STEP_ID'))
    number = int(job) * 7 + int(step) if job.isdigit() and step.isdigit() else 0
    host = environ.get('MASTER_ADDR') or expand_nodes(nodes)[0]
    if 'MASTER_PORT' in environ:
        return host, _number(environ, 'MASTER_PORT', 0xFFFF)
    return host, _PORTS[number % len(_PORTS)]


def _master_in(environ: Mapping[str, str]) -> tuple[str, int] | None:
    if 'MASTER_ADDR' in environ and 'MASTER_PORT' in environ:
        return environ['MASTER_ADDR'], _number(environ, 'MASTER_PORT', 0xFFFF)
    return None


def _number(environ: Mapping[str, str], name: str, most: int = 1 << 31) -> int:
    text = environ.get(name)
    if not re.fullmatch('[0-9]{1,10}', (text or '').strip()) or int(text or '') > most:
        raise ConfigError(f'{name} is {text!r} in the environment, where a launcher sets a number')
    return int(text or '')
