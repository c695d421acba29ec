"""An output directory's saves: stage, commit, latest, prune, sweep. Files only; knows no ranks.

A save is staged in ``.staging-TAG-ID`` and becomes TAG by a rename once it is complete; ``latest``
is replaced by a rename after that. What goes is renamed to ``.trash-TAG-ID`` first, so that no
reader ever meets a tag with half of its files. An id is random.

One process, rank 0's, owns a staging directory: it holds a lock on the file ``.lock-TAG-ID`` beside
it, which names it (see `internvl_ds.checkpoint.tag.owner`); a mark inside says the same.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_ds.checkpoint.tag.discovery import (
    LATEST,
    aside_of,
    header_or_none,
    is_tag,
    removable_tags,
    tags,
)
from internvl_ds.checkpoint.tag.manifest import FILE_NAME, FileEntry, Manifest, wrong_files
from internvl_ds.checkpoint.tag.owner import let_go, open_lock, this_process
from internvl_ds.checkpoint.tag.retention import EpochTag, Policy, later_tags, tags_to_prune
from internvl_ds.checkpoint.tag.shared import remove_unneeded
from internvl_ds.checkpoint.tag.sweep import LOCK, STAGING, sweep
from internvl_ds.checkpoint.tag.trash import MARK, discard, unlink
from internvl_ds.errors import CheckpointError, few
from internvl_ds.files import flush, replacing, write_text

logger = logging.getLogger(__name__)


@dataclass
class Staging:
    """A save in progress; belongs to the process that began it.

    Attributes:
        path: the directory that is written into.
        tag: what it becomes.
        save: the random id.
    """

    path: Path
    tag: str
    save: str
    _lock: int

    @property
    def output(self) -> Path:
        """The directory of tags."""
        return self.path.parent

    @property
    def aside(self) -> Path:
        """The name of an old tag while the new one takes its place."""
        return aside_of(self.output / self.tag, self.save)

    def release(self) -> None:
        """Releases the lock after the last write; the next sweep removes what is left."""
        if self._lock >= 0:
            if not (self.path.exists() or self.aside.exists()):
                unlink(_lock_of(self.path))
            let_go(self._lock)
            self._lock = -1


def begin(output: Path, tag: str, *, age: float | None = None) -> Staging:
    """Makes an empty staging directory for ``tag``, after a `sweep` with ``age``.

    Raises OSError when it cannot be made, or something of a user's has the name.
    """
    output.mkdir(parents=True, exist_ok=True)
    sweep(output, age=age)
    remove_unneeded(output)
    final = output / tag
    # Whether it is there last: another process may have removed it meanwhile.
    if not is_tag(final) and not _is_empty(final) and os.path.lexists(final):
        text = 'is no tag, and is not removed for one: give it another name'
        raise FileExistsError(errno.EEXIST, text, str(final))
    while True:
        owner = this_process()
        path = output / f'{STAGING}{tag}-{owner.id}'
        lock, is_held = open_lock(_lock_of(path))
        if is_held is not False:
            break
        let_go(lock)  # another process looks whether it is dead: that is to remove it
    staging = Staging(path, tag, owner.id, lock)
    try:
        text = owner.to_text()
        try:
            os.pwrite(lock, text.encode(), 0)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(_lock_of(path))) from error
        path.mkdir()
        write_text(path / MARK, text)
    except OSError:
        abandon(staging)
        raise
    return staging


def abandon(staging: Staging) -> None:
    """Removes a staging directory whose save failed."""
    shutil.rmtree(staging.path, ignore_errors=True)
    staging.release()


def require_files(
    staging: Staging, files: Mapping[str, FileEntry], sizes: Mapping[str, int]
) -> None:
    """Raises CheckpointError if this process does not see the ranks' files with ``sizes``."""
    wrong = wrong_files(files, sizes)
    if wrong:
        raise CheckpointError(
            f'{staging.path}: rank 0 does not see what the ranks wrote: {"; ".join(wrong[:3])}. '
            'OUTPUT must be one directory that all hosts share.'
        )


def commit(staging: Staging, manifest: Manifest, *, latest: bool = False) -> Path:
    """Publishes a staged tag: manifest last, flush, rename; then removes an old tag of the name.

    Args:
        staging: all of the tag's files are in it, and flushed.
        manifest: lists them.
        latest: name the tag in ``latest``: it is published with that, or not at all.

    Raises:
        OSError: when it cannot; all is then as it was.
        CheckpointError: when it is published, but ``latest`` cannot be made to name it.
    """
    output, final = staging.output, staging.output / staging.tag
    for folder, names, _ in os.walk(staging.path):  # a script may have made folders in it
        for name in names:
            flush(Path(folder, name))
    write_text(staging.path / FILE_NAME, manifest.to_text())
    is_published = False
    try:
        with replacing(output / LATEST) if latest else contextlib.nullcontext() as file:
            if file is not None:
                # On disk before the tag has its name: what is left to do needs no space.
                file.write(staging.tag.encode())
                file.flush()
                os.fsync(file.fileno())
            (staging.path / MARK).unlink(missing_ok=True)
            if final.exists():
                final.rename(staging.aside)
            staging.path.rename(final)
            is_published = True
            flush(output)
    except OSError as error:
        _take_back(staging, is_published, error)
        raise
    if staging.aside.exists():
        discard(staging.aside)
    staging.release()
    return final


def _take_back(staging: Staging, is_published: bool, cause: OSError) -> None:
    final = staging.output / staging.tag
    try:
        if is_published:
            final.rename(staging.path)
        if staging.aside.exists() and not final.exists():
            staging.aside.rename(final)
    except OSError as error:
        state = 'saved' if is_published else 'not saved'
        raise CheckpointError(
            f'{final}: {state}, but {staging.output / LATEST} may name another tag: {cause}; and '
            f'what was there cannot be put back: {error}'
        ) from cause


def next_sequence(output: Path) -> int:
    """One more than the highest sequence number among the tags that exist."""
    headers = map(header_or_none, tags(output))
    return 1 + max((header.sequence for header in headers if header), default=0)


def prune(output: Path, policies: Sequence[Policy]) -> list[str]:
    """Removes the epoch and step tags that no policy keeps, and returns their names.

    A tag that cannot be removed is a warning. After the first save of a run that was rewound, a
    warning names what stays of later training.
    """
    entries = removable_tags(output)
    names = tags_to_prune(entries, policies)
    later_names = [tag.name for tag in later_tags(entries)]
    # After the first save only: the save before it was the last one before the run was rewound.
    if later_names and entries[-2].name in later_names:
        rest = few([name for name in later_names if name not in names]) or 'none'
        removals = few([name for name in later_names if name in names]) or 'none'
        logger.warning(
            f'{output}: {entries[-1].name} was saved after tags of later training, of which {rest} '
            'stay until this run has come as far (internvl-ds ckpt prune --drop-later removes '
            f'them) and {removals} go; auto resume takes what was saved last'
        )
    return remove(output, [tag for tag in entries if tag.name in names])[0]


def remove(output: Path, entries: Sequence[EpochTag]) -> tuple[list[str], list[str]]:
    """Removes tags; returns the removed names, and the names that stay, with a warning.

    What another process has removed or replaced since it was found is neither.
    """
    removals: list[str] = []
    rest: list[str] = []
    for tag in entries:
        header = header_or_none(output / tag.name)
        if header is not None and header.sequence != tag.sequence:
            continue
        is_gone = discard(output / tag.name)
        if is_gone is not None:
            (removals if is_gone else rest).append(tag.name)
    remove_unneeded(output)
    return removals, rest


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not os.listdir(path)


def _lock_of(staging: Path) -> Path:
    return staging.with_name(staging.name.replace(STAGING, LOCK, 1))
