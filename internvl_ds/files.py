"""Writing files that others read: aside, flushed to disk, and renamed."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# What cannot be written, and was said to be so already.
_told: set[str] = set()


@contextlib.contextmanager
def for_show(what: str | Path, logger: logging.Logger) -> Iterator[None]:
    """Runs a block that writes what only people read: its failure is a warning, told once.

    Args:
        what: a file, or another name for what is written.
        logger: gets the warning.
    """
    try:
        yield
    except Exception as error:  # a full disk, a plot of odd numbers: training depends on none
        if str(what) not in _told:
            _told.add(str(what))
            reason = f'{type(error).__name__}: {error}'
            logger.warning('%s: cannot be written (%s): the run goes on without it', what, reason)


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` (UTF-8) so that a reader sees the old file or the new one."""
    aside = path.with_name(f'.{path.name}.tmp')
    try:
        with aside.open('w', encoding='utf-8') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Makes a file's content, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
