"""/dev/shm: its size, its free space, and files that dead CPU runs of DeepSpeed left."""

from __future__ import annotations

import os
import pwd
from collections import Counter
from pathlib import Path

from internvl_ds.tools.doctor.probe_result import ProbeResult, fault, ok, warn
from internvl_ds.tools.text import human_size

_BUFFERS = 'deepspeed_allreduce_buffer_*'
# DeepSpeed's own report asks for this much; a batch of 128 images of 224 pixels is 77 MB, and every
# worker of a DataLoader has two of them there.
_ENOUGH = 512 * 2**20


def probe(folder: Path = Path('/dev/shm')) -> list[ProbeResult]:
    """Memory for data loader workers, NCCL and CPU collectives; then left-over buffers."""
    try:
        stats = os.statvfs(folder)
    except OSError as error:
        why = 'DataLoader workers and NCCL cannot pass data. Mount a tmpfs there'
        return [fault('shared memory', f'{folder}: {error.strerror}', why)]
    size, free = stats.f_frsize * stats.f_blocks, stats.f_frsize * stats.f_bavail
    text = f'{human_size(free)} free of {human_size(size)} in {folder}'
    capacity = ok('shared memory', text)
    if free < _ENOUGH:
        advice = (
            'DataLoader workers die of a bus error, and NCCL of "unhandled system error". docker '
            'run --shm-size=16g (or --ipc=host), or remove what is left over there'
        )
        capacity = fault('shared memory', text, advice)
    return [capacity, _leftovers(folder)]


def remove_buffers(port: str) -> None:
    """Removes what DeepSpeed's CPU all-reduce leaves in /dev/shm for a job's port."""
    for path in Path('/dev/shm').glob(f'deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*'):
        path.unlink(missing_ok=True)


def _leftovers(folder: Path) -> ProbeResult:
    topic = 'left in /dev/shm'
    files = []
    for path in folder.glob(_BUFFERS):
        try:
            status = path.stat()
        except OSError:  # a run has ended meanwhile
            continue
        files.append((path, status.st_blocks * 512, status.st_uid))
    if not files:
        return ok(topic, "no buffers of DeepSpeed's CPU collectives")
    live = _files_in_use()
    dead = [(size, uid) for path, size, uid in files if str(path) not in live]
    if not dead:
        return ok(topic, f'{len(files)} buffers, all in use by running processes')
    owners = Counter(_user(uid) for _, uid in dead)
    whose = ', '.join(f'{count} of {name}' for name, count in sorted(owners.items()))
    buffers = f'{human_size(sum(size for size, _ in dead))} in {len(dead)} buffers'
    advice = f'memory that dead CPU runs keep; with no run under way: rm {folder}/{_BUFFERS}'
    return warn(topic, f'{buffers} that no process seen from here maps: {whose}', advice)


def _files_in_use() -> set[str]:
    """The files that processes map; of other users' processes root alone sees them."""
    files: set[str] = set()
    for maps in Path('/proc').glob('[0-9]*/maps'):
        try:
            words = maps.read_text().split()
        except OSError:  # it has ended, or is not ours to look into
            continue
        files.update(word for word in words if 'deepspeed_allreduce_buffer' in word)
    return files


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f'user {uid}'
