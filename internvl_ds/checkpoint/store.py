"""An output directory's saves: stage, commit, latest, prune, sweep. Files only; knows no ranks.

A save is staged in ``.staging-TAG-*`` and becomes TAG by a rename once it is complete; ``latest``
is replaced by a rename after that. What goes is renamed to ``.trash-*`` first, so that no reader
ever meets a tag with half of its files.

One process, rank 0's, owns a staging directory: it holds a lock (flock) on the file ``.lock-TAG-*``
beside it, which the kernel releases when that process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_ds.checkpoint.lookup import (
    ASIDE,
    LATEST,
    epoch_tags,
    header_or_none,
    problem,
    tags,
)
from internvl_ds.checkpoint.manifest import FILE_NAME, FileEntry, Manifest, wrong_files
from internvl_ds.checkpoint.retention import Policy, later_tags, tags_to_prune
from internvl_ds.errors import CheckpointError, few
from internvl_ds.files import flush, write_text

logger = logging.getLogger(__name__)

STAGING = '.staging-'
_LOCK = '.lock-'
TRASH = '.trash-'

# Seconds without a write after which a save is taken for dead where its lock cannot tell: another
# host's, or on a file system without locks.
_DEAD_AFTER = 24 * 3600.0


@dataclass
class Staging:
    """A save under way; belongs to the process that began it.

    Attributes:
        path: the directory that is written into.
        tag: what it becomes.
    """

    path: Path
    tag: str
    _lock: int

    @property
    def output(self) -> Path:
        """The directory of tags."""
        return self.path.parent

    def release(self) -> None:
        """Gives up the lock: nothing is written any more."""
        if self._lock >= 0:
            _lock_of(self.path).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def begin(output: Path, tag: str) -> Staging:
    """Makes an empty staging directory, and sweeps away what dead saves left.

    Raises:
        OSError: when it cannot be made.
    """
    output.mkdir(parents=True, exist_ok=True)
    sweep(output)
    path, lock = _lock_new_name(output, tag)
    staging = Staging(path, tag, lock)
    try:
        path.mkdir()
    except OSError:
        staging.release()
        raise
    return staging


def abandon(staging: Staging) -> None:
    """Removes a staging directory whose save failed."""
    shutil.rmtree(staging.path, ignore_errors=True)
    staging.release()


def require_files(
    staging: Staging, files: Mapping[str, FileEntry], sizes: Mapping[str, int]
) -> None:
    """Checks that this process sees the files that the ranks say they wrote.

    Args:
        staging: where they are.
        files: what the ranks say.
        sizes: name -> bytes, of what is there.

    Raises:
        CheckpointError: names the first files that it does not see.
    """
    wrong = wrong_files(files, sizes)
    if wrong:
        raise CheckpointError(
            f'{staging.path}: rank 0 does not see what the ranks wrote: {"; ".join(wrong[:3])}. '
            'OUTPUT must be one directory that all hosts share.'
        )


def commit(staging: Staging, manifest: Manifest) -> Path:
    """Publishes a staged tag: manifest last, flushed, renamed; an old tag of that name goes after.

    Returns:
        The tag's directory.

    Raises:
        OSError: when it cannot; an old tag of that name is then where it was.
    """
    final = staging.output / staging.tag
    aside = staging.output / f'{ASIDE}{staging.tag}'
    write_text(staging.path / FILE_NAME, manifest.to_text())
    if final.exists():
        _discard(aside)
        final.rename(aside)
    try:
        staging.path.rename(final)
    except OSError:
        if aside.exists() and not final.exists():
            aside.rename(final)
        raise
    flush(staging.output)
    staging.release()
    _discard(aside)
    return final


def write_latest(output: Path, tag: str) -> None:
    """Makes ``latest`` name a committed tag."""
    write_text(output / LATEST, tag)


def next_sequence(output: Path) -> int:
    """One more than the highest sequence number among the tags that exist."""
    headers = map(header_or_none, tags(output))
    return 1 + max((header.sequence for header in headers if header), default=0)


def prune(output: Path, policies: Sequence[Policy], *, quiet: bool = False) -> list[str]:
    """Removes the epoch and step tags that no policy keeps; a warning where one cannot be removed.

    After the first save of a run that was rewound, a warning names what stays of later training.

    Args:
        output: the directory.
        policies: at least one.
        quiet: leave that warning to the caller.

    Returns:
        The names of the tags that were removed.
    """
    found = sorted(epoch_tags(output), key=lambda tag: tag[:3])
    goes = tags_to_prune(found, policies)
    later = [tag.name for tag in later_tags(found)]
    # After the first save only: the save before it was the last one before the run was rewound.
    if not quiet and later and found[-2].name in later:
        logger.warning(
            '%s: %s was saved after tags of later training, of which %s stay until this run has '
            'come as far (internvl-ds ckpt prune --drop-later removes them) and %s go; auto resume '
            'takes what was saved last',
            output,
            found[-1].name,
            few([name for name in later if name not in goes]) or 'none',
            few([name for name in later if name in goes]) or 'none',
        )
    return [name for name in goes if _discard(output / name)]


def sweep(output: Path) -> list[str]:
    """Removes what dead processes left: stagings, and tags that were half removed.

    A staging directory goes only when its owner is known to be dead. A tag that stepped aside for
    a save that died before it took the name gets its name back.

    Returns:
        The names of the staging directories that were removed.
    """
    swept = []
    for path in sorted(output.glob(f'{STAGING}*')):
        if _is_dead(path):
            logger.warning('%s: left by a save that died; removed', path)
            _discard(path)
            swept.append(path.name)
    for lock in output.glob(f'{_LOCK}*'):
        path = output / lock.name.replace(_LOCK, STAGING, 1)
        if not path.exists() and _is_dead(path):
            lock.unlink(missing_ok=True)
    for path in output.glob(f'{TRASH}*'):
        shutil.rmtree(path, ignore_errors=True)
    for aside in output.glob(f'{ASIDE}*'):
        tag = output / aside.name.removeprefix(ASIDE)
        if any(output.glob(f'{STAGING}{tag.name}-*')):
            continue  # its save is still alive
        if tag.exists():
            _discard(aside)
        elif problem(aside) is None:
            logger.warning('%s: the save that was to replace it died; it has its name again', tag)
            aside.rename(tag)
    return swept


def _discard(path: Path) -> bool:
    """Takes a directory's name away and then its files; what cannot be removed is a warning.

    Returns:
        Whether this call took the name away.
    """
    trash = path.with_name(f'{TRASH}{path.name}-{secrets.token_hex(4)}')
    try:
        path.rename(trash)
    except FileNotFoundError:
        return False
    except OSError as error:
        logger.warning('could not remove %s: %s', path, error)
        return False
    try:
        shutil.rmtree(trash)
    except OSError as error:
        logger.warning('could not remove all of %s: %s', trash, error)
    return True


def _lock_of(staging: Path) -> Path:
    return staging.with_name(staging.name.replace(STAGING, _LOCK, 1))


def _lock_new_name(output: Path, tag: str) -> tuple[Path, int]:
    """A staging path that nobody has, and the descriptor of its lock, held by this process."""
    while True:
        path = output / f'{STAGING}{tag}-{secrets.token_hex(4)}'
        descriptor = os.open(_lock_of(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process looks whether it is dead: take another name
            os.close(descriptor)
            _lock_of(path).unlink(missing_ok=True)
            continue
        except OSError as error:
            logger.info('%s: no file locks here (%s); leftovers go by their age', output, error)
        os.write(descriptor, socket.gethostname().encode())
        return path, descriptor


def _is_dead(staging: Path) -> bool:
    """Whether no process can be writing into a staging directory any more."""
    try:
        descriptor = os.open(_lock_of(staging), os.O_RDWR)
    except OSError:
        return _untouched_for_long(staging)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # On some network file systems a lock is seen on its own host only.
        own = os.read(descriptor, 1024).decode(errors='replace') == socket.gethostname()
    except BlockingIOError:
        return False
    except OSError:
        own = False
    finally:
        os.close(descriptor)
    return own or _untouched_for_long(staging)


def _untouched_for_long(directory: Path) -> bool:
    try:
        with os.scandir(directory) as entries:
            touched = [entry.stat().st_mtime for entry in entries]
        return time.time() - max([directory.stat().st_mtime, *touched]) > _DEAD_AFTER
    except OSError:  # just renamed or removed
        return False
