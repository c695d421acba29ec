"""One job writes into an output directory, and it is the same directory from save to save.

Rank 0 holds the lock from the start of the training program, or the first save of a script, until
`internvl_ds.shutdown`. The file names the owner; a thread renews the file's time, the sign of life
for hosts that do not see the lock.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from yacs.config import CfgNode

from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.tag import owner as owners
from internvl_ds.checkpoint.tag.discovery import header_or_none
from internvl_ds.checkpoint.tag.owner import Owner, read_owner
from internvl_ds.config.tree import checkpoint_option
from internvl_ds.dist.process_group import before_shutdown
from internvl_ds.errors import CheckpointError
from internvl_ds.files import forks

logger = logging.getLogger(__name__)

LOCK = '.internvl_ds.lock'
_BEATS = 6  # signs of life within CHECKPOINT.LOCK_AGE


@dataclass
class _Output:
    """An output directory that this process writes into.

    Attributes:
        path: the directory.
        place: device and inode; both may change when a share is mounted again.
        saves: tag -> id of the save, of what this process saved there.
        owner, descriptor: of the lock; None and -1 where this process holds none.
        ended: ends the signs of life.
    """

    path: Path
    place: tuple[int, int]
    saves: dict[str, str] = field(default_factory=dict)
    owner: Owner | None = None
    descriptor: int = -1
    ended: threading.Event = field(default_factory=threading.Event)

    def give_up(self) -> None:
        """Releases the lock; its file stays."""
        self.ended.set()
        if self.descriptor >= 0:
            owners.let_go(self.descriptor)
        self.descriptor = -1


_outputs: dict[str, _Output] = {}


def enter_output(output: Path, config: CfgNode, limit: float) -> None:
    """Makes and locks a directory to save in; later calls check that it is still the same.

    Args:
        output: the directory.
        config: CHECKPOINT.SHARED_OUTPUT, LOCK_WAIT and LOCK_AGE (seconds) are read.
        limit: seconds after which it must be known whether a job of another host still lives.

    Raises:
        CheckpointError: when another job writes there, or the directory is not the one that this
            process locked or saved in, as when a share is not mounted.
        OSError: when it cannot be made or written.
    """
    key = os.path.abspath(output)
    entry = _outputs.get(key)
    if entry is None:
        output.mkdir(parents=True, exist_ok=True)
        place = _place_of(output)
        # Absolute: the program may change its directory. And it may have another name for one.
        twins = (
            o for o in _outputs.values() if os.path.exists(o.path) and _place_of(o.path) == place
        )
        entry = next(twins, _Output(Path(key), place))
    else:
        _require_same(entry)
    if not checkpoint_option(config, 'SHARED_OUTPUT'):
        age, wait = checkpoint_option(config, 'LOCK_AGE'), checkpoint_option(config, 'LOCK_WAIT')
        _lock(entry, wait, age, limit)
    _outputs[key] = entry


def note_save(output: Path, tag: str, save: str) -> None:
    """Remembers a committed tag, by which the directory is recognised later."""
    if entry := _outputs.get(os.path.abspath(output)):
        entry.saves[tag] = save


def _place_of(output: Path) -> tuple[int, int]:
    status = output.stat()
    return status.st_dev, status.st_ino


def _require_same(entry: _Output) -> None:
    try:
        place = _place_of(entry.path)
    except OSError as error:
        raise CheckpointError(
            f'{entry.path}: this run writes there, and it is gone ({error.strerror}): is the file '
            'system still mounted? Nothing was written, and it is not made anew'
        ) from error
    if place == entry.place:
        return
    is_ours = entry.owner is not None and read_owner(entry.path / LOCK) == entry.owner
    saves = ((header_or_none(entry.path / tag), save) for tag, save in entry.saves.items())
    if not is_ours and not any(header and header.save == save for header, save in saves):
        raise CheckpointError(
            f'{entry.path}: is not the directory that this run has written in, neither its lock '
            'nor its tags are there: is the file system still mounted? Nothing was written'
        )
    entry.place = place
    entry.give_up()  # of the old mount


def _lock(entry: _Output, wait: float, age: float, limit: float) -> None:
    path = entry.path / LOCK
    owner = read_owner(path)
    if entry.owner is not None:
        if owner == entry.owner and entry.descriptor >= 0:
            return
        if owner not in (None, entry.owner):
            raise CheckpointError(
                f'{entry.path}: {owner} took over while this process gave no sign of life for '
                f'CHECKPOINT.LOCK_AGE {age:g} s; nothing was written'
            )
        entry.give_up()  # removed by someone, or given up at a shutdown: it is taken again
    start, first_beat, has_warned = time.monotonic(), None, False
    while True:
        descriptor, is_held = owners.open_lock(path)
        owner, beat = read_owner(descriptor), os.fstat(descriptor).st_mtime
        free = True if is_held is not False and owner is None else owners.has_ended(owner, is_held)
        silence = 0.0
        if free is None:
            first_beat = first_beat or beat
            silence = _now_in(entry.path) - beat
            free = False if beat != first_beat else silence > age or None
        if free and _take(entry, descriptor, is_held, age):
            return
        owners.let_go(descriptor)
        if time.monotonic() - start >= (limit if free is None else wait):
            unsure = f', silent for {silence:.0f} s and dead after LOCK_AGE {age:g} s'
            raise CheckpointError(
                f'{entry.path}: another job writes there: {owner or "a process that just began"}'
                f'{unsure if free is None else ""}. Two jobs in one OUTPUT mix their tags: give '
                'each its own, or set CHECKPOINT.SHARED_OUTPUT True if that is meant'
            )
        if not has_warned:
            logger.warning('%s: %s writes there; waiting for its end', entry.path, owner)
            has_warned = True
        time.sleep(0.2)


def _take(entry: _Output, descriptor: int, is_held: bool | None, age: float) -> bool:
    """Writes the owner into the lock; False if another process did so at the same time."""
    path, owner = entry.path / LOCK, owners.this_process()
    text = owner.to_text().encode()
    try:
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))
        os.fsync(descriptor)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error is raised, not this one
            path.unlink()
        owners.let_go(descriptor)
        raise OSError(error.errno, error.strerror, str(path)) from error
    if is_held is None:  # only what was written last can tell
        time.sleep(age / 60)
        if read_owner(path) != owner:
            return False
    entry.owner, entry.descriptor, entry.ended = owner, descriptor, threading.Event()
    before_shutdown(_release_all)
    forks.at_fork(_release_all, _outputs.clear)
    _release_at_exit()
    arguments = path, owner, age / _BEATS, entry.ended
    threading.Thread(target=_beat, args=arguments, name='lock', daemon=True).start()
    return True


def _beat(path: Path, owner: Owner, interval: float, ended: threading.Event) -> None:
    while not ended.wait(interval):
        # Where it cannot, the next save finds out why, and says so.
        with contextlib.suppress(OSError):
            if read_owner(path) == owner:
                os.utime(path, follow_symlinks=False)


def _now_in(output: Path) -> float:
    """The time by the clock of the directory's file system."""
    with tempfile.TemporaryFile(dir=output) as file:
        return os.fstat(file.fileno()).st_mtime


def _release_all() -> None:
    if async_save.is_pending():  # it still writes there; then the kernel releases the locks
        return
    for entry in _outputs.values():
        path = entry.path / LOCK
        if entry.descriptor >= 0 and read_owner(path) == entry.owner:
            try:
                path.unlink()
            except OSError as error:
                logger.warning('%s: cannot be removed (%s); it holds no lock', path, error)
        entry.give_up()


@functools.cache
def _release_at_exit() -> None:
    atexit.register(_release_all)
