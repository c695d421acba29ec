"""The files in /dev/shm that killed ranks leave behind, and their removal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Set
from pathlib import Path

# What MPICH, Open MPI and DeepSpeed leave there.
_NAMES = ('mpich_shm_*', 'sm_segment.*', 'deepspeed_allreduce_buffer_*')
_YOUNG = 5.0  # seconds: a younger file may be of another session's rank, which is about to map it


def shared_files() -> set[Path]:
    """The files that are there now."""
    return {path for pattern in _NAMES for path in Path('/dev/shm').glob(pattern)}


def remove_unused(before: Set[Path], young: float = _YOUNG) -> None:
    """Removes the files that were not there ``before`` and that no process uses any more."""
    used, now = _mapped(), time.time()
    for path in shared_files() - before:
        with contextlib.suppress(FileNotFoundError):
            if str(path) not in used and now - path.stat().st_mtime > young:
                path.unlink()


def _mapped() -> str:
    """All that processes here have mapped, as one text."""
    texts = []
    for maps in Path('/proc').glob('[0-9]*/maps'):
        try:
            texts.append(maps.read_text(errors='replace'))
        except OSError:  # it has ended, or is another user's
            continue
    return '\n'.join(texts)
