"""Files that several tags of an output directory have: CHECKPOINT.FROZEN 'once'. Knows no ranks.

Each tag has a hard link to such a file, and the file system counts them. Where it has no links, the
file lies next to the tags, and goes with the last tag whose manifest lists it.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from internvl_ds.checkpoint.tag.discovery import ASIDE, read_manifest
from internvl_ds.checkpoint.tag.manifest import is_shared
from internvl_ds.checkpoint.tag.sweep import STAGING
from internvl_ds.checkpoint.tag.trash import unlink
from internvl_ds.errors import CheckpointError

logger = logging.getLogger(__name__)


def holders(output: Path, name: str) -> list[Path]:
    """Where a shared file lies in an output directory: next to the tags, and in which of them."""
    with os.scandir(output) as entries:
        folders = [e.path for e in entries if not e.name.startswith('.') and e.is_dir()]
    places = [output / name, *(Path(folder, name) for folder in folders)]
    return [path for path in places if _is_file(path)]


def remove_unneeded(output: Path) -> list[str]:
    """Removes the shared files next to the tags that no tag needs; returns their names.

    While a save is under way none goes: it may need one. Nor where a manifest cannot be read.
    """
    found = sorted(name for name in os.listdir(output) if is_shared(name))
    if not found:
        return []
    needed: set[str] = set()
    try:
        for name in os.listdir(output):
            if not name.startswith('.') or name.startswith(ASIDE):
                manifest = read_manifest(output / name) if (output / name).is_dir() else None
                needed.update(manifest.files if manifest else ())
    except CheckpointError as error:
        logger.warning('%s: shared files of frozen parameters stay for now: %s', output, error)
        return []
    goes = [name for name in found if name not in needed]
    # Looked at last: a save that begins after this finds that its file has gone, and says so.
    if any(name.startswith(STAGING) for name in os.listdir(output)):
        return []
    for name in goes:
        unlink(output / name)
    return goes


def own_size(tag: Path, sizes: Iterable[tuple[str, int]]) -> int:
    """Bytes that removing a tag frees: the size of its files that no other tag links."""
    total = 0
    for name, size in sizes:
        path = tag / name
        alone = not is_shared(name) or (_is_file(path) and path.stat().st_nlink == 1)
        total += size if alone else 0
    return total


def counted_again(tags: Iterable[Path]) -> int:
    """Bytes that the sizes of several tags count again, though they are on disk once."""
    total, once = 0, {}
    for tag in tags:
        for name in filter(is_shared, os.listdir(tag) if tag.is_dir() else ()):
            if _is_file(tag / name):
                status = (tag / name).stat()
                total += status.st_size
                once[status.st_dev, status.st_ino] = status.st_size
    return total - sum(once.values())


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
