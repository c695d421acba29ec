"""Clearing up after processes that died in an output directory. Files only; knows no ranks.

Only what this package has made is touched: it has a mark inside, or the lock of a save beside it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from internvl_ds.checkpoint.tag.discovery import ASIDE, header_or_none, problem
from internvl_ds.checkpoint.tag.owner import has_ended, let_go, open_lock, read_owner
from internvl_ds.checkpoint.tag.trash import MARK, TRASH, discard, remove_marked, unlink

logger = logging.getLogger(__name__)

STAGING = '.staging-'
LOCK = '.lock-'

_OURS = re.compile(r'(\.(?:staging|lock|trash|old)-)((.+)-([0-9a-f]{16}))')

# What looks like ours and is not known to be, and was said to be so already.
_reports: set[Path] = set()


def sweep(output: Path, *, age: float | None = None) -> list[str]:
    """Removes what dead processes left: stagings, and tags that were half removed.

    A staging directory goes only when its owner is known to be dead. A tag that stepped aside for
    a save that died before it took the name gets its name back.

    Args:
        output: the directory.
        age: seconds without a write after which an owner that cannot be seen from here counts as
            dead; None for the default of CHECKPOINT.LEFTOVER_AGE.

    Returns the names of the staging directories that were removed.
    """
    if age is None:
        # yacs and YAML with it, which a listing can do without
        from internvl_ds.config.tree import default_of

        age = default_of('CHECKPOINT.LEFTOVER_AGE')
    saves: dict[str, set[str]] = defaultdict(set)
    strangers = []
    for name in sorted(os.listdir(output)) if output.is_dir() else ():
        if match := _OURS.fullmatch(name):
            if match[1] == TRASH:
                _sweep_trash(output / name)
            else:
                saves[match[2]].add(match[1])
        elif name.startswith((STAGING, TRASH, ASIDE)):
            strangers.append(output / name)
    keys = [key for key, prefixes in saves.items() if _sweep_save(output, key, prefixes, age)]
    for path in strangers:
        # Of a version that left no marks: a tag that stepped aside for a save that died.
        tag = output / path.name.removeprefix(ASIDE)
        header = header_or_none(path) if path.name.startswith(ASIDE) else None
        is_ours = header is not None and header.tag == tag.name
        if is_ours and any(name.startswith(f'{STAGING}{tag.name}-') for name in os.listdir(output)):
            continue  # its save may be alive
        if not (is_ours and _give_name_back(path, tag)):
            _leave(path)
    return [f'{STAGING}{key}' for key in keys if STAGING in saves[key]]


def _sweep_save(output: Path, key: str, prefixes: set[str], age: float) -> bool:
    """Removes the staging of a save of ours that is dead; returns whether it did."""
    staging, lock, aside = (output / f'{prefix}{key}' for prefix in (STAGING, LOCK, ASIDE))
    name, _, save = key.rpartition('-')
    with contextlib.ExitStack() as stack:
        is_held: bool | None = None
        if LOCK in prefixes:
            try:
                descriptor, is_held = open_lock(lock, make=False)
            except OSError:  # just removed, or no file
                return False
            stack.callback(let_go, descriptor)
        owners = [read_owner(lock), read_owner(staging / MARK)]
        owner = next((owner for owner in owners if owner and owner.id == save), None)
        if owner is None:
            if is_held and not lock.stat().st_size:  # killed before it wrote a word
                unlink(lock)
            elif prefixes != {LOCK}:
                _leave(staging if STAGING in prefixes else aside)
            return False
        is_dead = has_ended(owner, is_held)
        places = [output / f'{prefix}{key}' for prefix in prefixes]
        if is_dead is False or (is_dead is None and time.time() - _last_write(places) <= age):
            return False
        if STAGING in prefixes:
            logger.warning('%s: left by a save that died; removed (it was of %s)', staging, owner)
            discard(staging)
        tag = output / name
        if ASIDE in prefixes and not _give_name_back(aside, tag) and tag.exists():
            logger.warning('%s: left by a save that died; removed (it was of %s)', aside, owner)
            discard(aside)
        if not (staging.exists() or aside.exists()):
            unlink(lock)
        return True


def _sweep_trash(trash: Path) -> None:
    """A directory with the mark was being removed by some process; an empty one had it last."""
    if trash.is_symlink() or not trash.is_dir():
        return
    try:
        if read_owner(trash / MARK) is None and any(trash.iterdir()):
            _leave(trash)
        elif remove_marked(trash):
            logger.info('%s: the rest of a tag that was being removed; removed', trash)
    except FileNotFoundError:
        return  # the process that began has just ended
    except OSError as error:
        logger.warning('could not remove all of %s: %s', trash, error)


def _give_name_back(aside: Path, tag: Path) -> bool:
    if tag.exists() or problem(aside) is not None:
        return False
    logger.warning('%s: the save that was to replace it died; it has its name again', tag)
    aside.rename(tag)
    return True


def _leave(path: Path) -> None:
    if path not in _reports:
        _reports.add(path)
        logger.info('%s: not known to be of this version of internvl_ds; left as it is', path)


def _last_write(places: Sequence[Path]) -> float:
    """The latest write in these directories, seconds since the epoch."""
    newest = 0.0
    for path in (path for place in places for path in (place, *place.rglob('*'))):
        with contextlib.suppress(FileNotFoundError):  # just renamed or removed
            newest = max(newest, path.lstat().st_mtime)
    return newest
