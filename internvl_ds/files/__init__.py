"""Writing files that others read: aside, flushed to disk, and renamed.

Others who may write into a directory can put links, pipes and files of any name there. So a file
that is written aside has a random new name, and a fixed name is opened without following links.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from internvl_ds.files.locks import try_lock

_log = logging.getLogger(__name__)

_ASIDE = re.compile(r'\.internvl_ds-[0-9a-f]{16}\.tmp')
# Seconds without a write after which an aside that nobody has locked is left over: a lock may not
# be seen on another host.
_LEFT_AFTER = 3600.0

# What cannot be written, and was said to be so already.
_warnings: set[str] = set()


@contextlib.contextmanager
def for_show(what: str | Path, logger: logging.Logger) -> Iterator[None]:
    """Runs a block that writes files for people only: logs its first failure as a warning.

    Args:
        what: a file, or another name for what is written.
        logger: gets the warning.
    """
    try:
        yield
    except Exception as error:  # a full disk, a plot of odd numbers: training depends on none
        if str(what) not in _warnings:
            _warnings.add(str(what))
            reason = f'{type(error).__name__}: {error}'
            logger.warning('%s: cannot be written (%s): the run goes on without it', what, reason)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a new file that replaces ``path`` if the block succeeds.

    It is flushed to disk before: a reader sees the old file or the new one. A link that has the
    name is replaced, not followed.

    Raises:
        OSError: with ``path``, when it cannot be written; what was there stays.
    """
    _remove_left(path.parent)
    aside = path.with_name(f'.internvl_ds-{secrets.token_hex(8)}.tmp')
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(aside, flags, 0o666), 'w+b') as file:
            try:
                try_lock(file)  # on a file system without locks: see _LEFT_AFTER
                yield file
                file.flush()
                os.fsync(file.fileno())
                aside.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):  # the first error is raised, not this one
                    aside.unlink()
                raise
        flush(path.parent)
    except OSError as error:
        if error.filename not in (None, str(aside)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` (UTF-8) so that a reader sees the old file or the new one."""
    with replacing(path) as file:
        file.write(text.encode())


def open_own(path: Path, flags: int, *, make: bool = True) -> int:
    """Opens a file whose name is this package's, for writing, and returns its descriptor.

    Args:
        flags: `os.O_APPEND` or `os.O_TRUNC`; `os.O_RDWR` to read it too.
        make: make it where it is not there.

    Raises:
        OSError: for a link, a pipe, a device, or where it cannot be opened.
    """
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe would be waited for
    flags |= 0 if flags & os.O_RDWR else os.O_WRONLY
    descriptor = os.open(path, flags | (os.O_CREAT if make else 0), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, 'is no regular file', str(path))
    return descriptor


def _remove_left(folder: Path) -> None:
    """Removes temporary files of `replacing` that killed processes left."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if _ASIDE.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):  # locked: in use; or just renamed
                descriptor = open_own(folder / name, os.O_APPEND, make=False)
                try:
                    age = time.time() - os.fstat(descriptor).st_mtime
                    if age > _LEFT_AFTER and try_lock(descriptor):
                        (folder / name).unlink()
                        _log.info('%s: left by a process that died; removed', folder / name)
                finally:
                    os.close(descriptor)


def flush(path: Path) -> None:
    """Makes a file's content, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
