"""Limits of this shell and container: open files, processes, memory, cores."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import psutil

from internvl_ds.tools.doctor.probe_result import ProbeResult, fault, ok, warn
from internvl_ds.tools.text import human_size

_CGROUP = Path('/sys/fs/cgroup')
_FILES_LEAST, _FILES_GOOD = 1024, 4096
_THREADS_LEAST = 512
_MEMORY_LEAST = 2e9  # bytes; two CPU ranks with a tiny model take 1.4 GB
_UNLIMITED = 2**60  # what the kernel's older interface says for no limit is above it


def probe() -> list[ProbeResult]:
    """One line each."""
    return [_open_files(), _processes(), _memory(), _cores()]


def _open_files() -> ProbeResult:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    topic, text = 'open files', f'soft limit {_shown(soft)}, hard limit {_shown(hard)}'
    raise_it = f'ulimit -n {min(65536, hard) if hard >= 0 else 65536}'
    if 0 <= hard < _FILES_GOOD:
        raise_it = 'Raise it in /etc/security/limits.conf, or by docker run --ulimit nofile=65536'
    if 0 <= soft < _FILES_LEAST:
        advice = (
            'workers, sockets and the files of a checkpoint take more: "Too many open files", '
            f'often hours into a run. {raise_it}'
        )
        return fault(topic, text, advice)
    if 0 <= soft < _FILES_GOOD:
        return warn(topic, text, f'many ranks with many workers may take more: {raise_it}')
    return ok(topic, text)


def _processes() -> ProbeResult:
    """Counts threads too; the limit of the container applies as well as the user's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    pids = _tightest('pids.max')
    text = f'soft limit {_shown(soft)}, hard limit {_shown(hard)}'
    # The kernel does not hold root to the soft limit.
    rests = [soft] if soft >= 0 and os.geteuid() != 0 else []
    if pids is not None:
        count = _number(pids[1] / 'pids.current') or 0
        rests.append(pids[0] - count)
        text += f"; the container's: {pids[0]}, {count} in use"
    if rests and min(rests) < _THREADS_LEAST:
        advice = (
            'ranks, their workers and threads take hundreds: "Resource temporarily unavailable". '
            'Raise it: ulimit -u, or docker run --pids-limit'
        )
        return fault('processes', text, advice)
    return ok('processes', text)


def _memory() -> ProbeResult:
    memory = psutil.virtual_memory()
    available = memory.available
    text = f'{human_size(available)} available of {human_size(memory.total)}'
    limit = _tightest('memory.max') or _tightest('memory/memory.limit_in_bytes')
    advice = ''
    if limit is not None and limit[0] < memory.total:
        usage = _usage(limit[1])
        available = min(available, limit[0] - usage)
        text += f'; the container is limited to {human_size(limit[0])}, {human_size(usage)} in use'
        advice = 'over the limit the kernel kills a rank (signal 9, status 137) without a word'
    if available < _MEMORY_LEAST:
        need = f'two ranks with a tiny model take {human_size(1.4e9)}'
        return fault('memory', text, f'{need}; {advice or "free some"}')
    return warn('memory', text, advice) if advice else ok('memory', text)


def _usage(group: Path) -> int:
    """Bytes that a control group holds, without the file cache that it can let go of."""
    total = _number(group / 'memory.current') or _number(group / 'memory.usage_in_bytes') or 0
    try:
        lines = (group / 'memory.stat').read_text().splitlines()
    except OSError:
        return total
    cache = next((int(line.split()[1]) for line in lines if line.startswith('inactive_file')), 0)
    return max(0, total - cache)


def _cores() -> ProbeResult:
    """Cores that this process may run on, against the time that a container gives it."""
    cores = len(os.sched_getaffinity(0))
    quotas = []
    for folder in _groups():
        try:
            quota, period = (folder / 'cpu.max').read_text().split()
        except (OSError, ValueError):
            continue
        if quota != 'max':
            quotas.append(int(quota) / int(period))
    if quotas and min(quotas) < cores:
        advice = (
            'threads and workers are counted by cores, and stand still over that: set '
            'OMP_NUM_THREADS and DATA.NUM_WORKERS by what is given'
        )
        text = f'{cores}, and the container gives the time of {min(quotas):g}'
        return warn('cores', text, advice)
    return ok('cores', f'{cores} for this process')


def _tightest(name: str) -> tuple[int, Path] | None:
    """The smallest limit of this process's control groups, and its folder; None without any."""
    files = [folder / name for folder in _groups()]
    limits = [(limit, file.parent) for file in files if (limit := _number(file)) is not None]
    limits = [pair for pair in limits if pair[0] < _UNLIMITED]
    return min(limits, key=lambda pair: pair[0], default=None)


def _groups() -> list[Path]:
    """This process's control group and those above it, as far as they are seen from here."""
    try:
        lines = Path('/proc/self/cgroup').read_text().splitlines()
    except OSError:
        return [_CGROUP]
    group = next((line[3:] for line in lines if line.startswith('0::')), '/')
    path = _CGROUP / group.lstrip('/')
    return [folder for folder in (path, *path.parents) if folder.is_relative_to(_CGROUP)]


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _shown(limit: int) -> str:
    return 'unlimited' if limit < 0 else str(limit)
