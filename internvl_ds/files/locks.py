"""Locks on open files (flock): the kernel releases a lock when its last holder ends."""

from __future__ import annotations

import fcntl
from typing import IO


def try_lock(file: int | IO) -> bool | None:
    """Takes the exclusive lock of an open file, by its descriptor or object; does not wait.

    Returns:
        Whether this process holds the lock now; None where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
