"""The process that owns something in an output directory, and whether that process still lives.

An owner holds a lock (flock), which the kernel releases when the process ends. Where locks say
nothing, number and start time of the process decide on its own machine; elsewhere only an age does.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from internvl_ds.files import forks, open_own
from internvl_ds.files.locks import try_lock
from internvl_ds.files.reading import parse_json, read_bytes

_LONGEST = 4096  # bytes of a record


class Owner(NamedTuple):
    """The content of a lock and of a mark: JSON of texts.

    Attributes:
        id: random; names what is owned.
        host, pid: of the process.
        machine: this boot of the host, and the space of its process numbers (a container's).
        started: when the process started, in clock ticks since that boot.
        since: when it took what it owns, UTC, ISO 8601.
    """

    id: str
    host: str
    pid: str
    machine: str
    started: str
    since: str

    def __str__(self) -> str:
        return f'process {self.pid} on {self.host}, since {self.since}'

    def to_text(self) -> str:
        """The form in a file."""
        return json.dumps(self._asdict()) + '\n'


def this_process() -> Owner:
    """A record of this process, with a new random id."""
    now, pid = datetime.now(timezone.utc).isoformat(timespec='seconds'), os.getpid()
    place = socket.gethostname(), str(pid), _machine(), _started(pid) or ''
    return Owner(secrets.token_hex(8), *place, now)


def read_owner(place: Path | int) -> Owner | None:
    """Reads the record in a file, by path (no link) or descriptor; None if there is none."""
    try:
        if isinstance(place, int):
            data = os.pread(place, _LONGEST, 0)
        else:
            data = read_bytes(place, _LONGEST, ours=True)
        owner = Owner(**parse_json(data.decode()))
    except (OSError, ValueError, TypeError):
        return None  # not there, or not ours
    return owner if all(isinstance(value, str) for value in owner) else None


def has_ended(owner: Owner | None, is_held: bool | None) -> bool | None:
    """Whether the process that a record names is gone; None where nothing here can tell.

    ``is_held``: what `open_lock` said of its lock; None where there is no lock.
    """
    if is_held is False:
        return False
    if owner is None:
        return None
    here = owner.machine == _machine()
    if is_held and (here or owner.host == socket.gethostname()):
        return True
    return not _is_alive(owner) if here else None


def _is_alive(owner: Owner) -> bool:
    with contextlib.suppress(PermissionError):  # another user's
        try:
            os.kill(int(owner.pid), 0)
        except (ProcessLookupError, OverflowError, ValueError):
            return False
    started = _started(int(owner.pid))
    return started is None or started == owner.started


def open_lock(path: Path, *, make: bool = True) -> tuple[int, bool | None]:
    """Opens a lock file (no link) and tries to take the lock; see `let_go`.

    Forked children close the file, and other programs do not get it: the lock is this process's.

    Returns:
        The descriptor, and whether this process holds the lock now: False where another process
        does, None where the file system has no locks.
    """
    while True:
        descriptor = open_own(path, os.O_RDWR, make=make)
        forks.at_fork(descriptor, functools.partial(os.close, descriptor))
        is_held = try_lock(descriptor)
        if not is_held or _is_still(path, descriptor):
            return descriptor, is_held
        let_go(descriptor)  # its owner removed it just now


def let_go(descriptor: int) -> None:
    """Closes what `open_lock` opened."""
    forks.forget(descriptor)
    os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    return False


@functools.cache
def _machine() -> str:
    boot = Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()
    return f'{boot} {Path("/proc/self/ns/pid").readlink()}'


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the boot; '' of one that has ended; None: unknown."""
    try:
        text = Path(f'/proc/{pid}/stat').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return None
    fields = text.rpartition(')')[2].split()
    return '' if fields[0] in 'ZX' else fields[19]
