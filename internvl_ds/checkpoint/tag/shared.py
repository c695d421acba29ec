"""Files that several tags of an output directory have, by hard links. Knows no ranks.

The file system counts the links, so a tag goes as any other. What CHECKPOINT.FROZEN 'once' shares
has a name of its own and, where the file system has no links, lies next to the tags and goes with
the last one whose manifest lists it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from internvl_ds.checkpoint.tag.discovery import ASIDE, file_sizes, read_manifest
from internvl_ds.checkpoint.tag.manifest import FileEntry, is_shared
from internvl_ds.checkpoint.tag.sweep import STAGING
from internvl_ds.checkpoint.tag.trash import unlink
from internvl_ds.errors import CheckpointError

logger = logging.getLogger(__name__)

# Of files that were read: device, inode, size, time of the last write -> what was found.
Known = dict[tuple[int, int, int, int], FileEntry]

# What says that a file gets no further name here, and not that it has gone.
NO_LINK = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EACCES}


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


def freed_by(tags: Iterable[Path]) -> int:
    """Bytes that removing tags frees together: of files whose every link lies in one of them."""
    found = [status for tag in tags for status in _files_in(tag)]
    links = Counter((status.st_dev, status.st_ino) for status in found)
    single = {(s.st_dev, s.st_ino): s for s in found}
    return sum(s.st_size for key, s in single.items() if s.st_nlink <= links[key])


def counted_again(tags: Iterable[Path]) -> int:
    """Bytes that the sizes of several tags count again, though they are on disk once."""
    found = [status for tag in tags if tag.is_dir() for status in _files_in(tag)]
    once = {(status.st_dev, status.st_ino): status.st_size for status in found}
    return sum(status.st_size for status in found) - sum(once.values())


def _files_in(tag: Path) -> Iterator[os.stat_result]:
    """Of the regular files below a tag, the manifest left out; a link to one elsewhere is none."""
    for name in file_sizes(tag):
        with contextlib.suppress(FileNotFoundError):  # a run prunes meanwhile
            status = os.lstat(tag / name)
            if stat.S_ISREG(status.st_mode):
                yield status


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
