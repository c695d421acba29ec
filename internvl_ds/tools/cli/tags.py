"""What the ``ckpt`` command finds out about tags. Files only; reads, and changes nothing."""

from __future__ import annotations

import errno
import os
import threading
import time
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from internvl_ds.checkpoint.tag.discovery import (
    ASIDE,
    file_sizes,
    header_or_none,
    is_tag,
    newest,
    present,
    problem,
    read_latest,
    read_manifest,
    stand_ins,
    tag_of_aside,
    tags,
)
from internvl_ds.checkpoint.tag.manifest import Header, Manifest, epoch_of
from internvl_ds.errors import CheckpointError, CheckpointNotFound, shown

_REPLACED = 10  # times that a tag is examined again which a run replaces meanwhile
_BETWEEN = 0.01  # seconds: longer than a tag takes to get its name
_READERS = 4  # files read at once: enough for a disk array, and few enough for a single disk
# Of a header: said elsewhere, or of use to a load only.
_NOT_SHOWN = ('tag', 'size', 'format', 'save')


@dataclass(frozen=True)
class Examined:
    """A tag and what was found about it.

    Attributes:
        path: the directory.
        header: None without a manifest, or without a readable one.
        size: bytes of all its files, but for the manifest.
        saved: seconds since the epoch: the header's time, else the directory's.
        verified: 'sizes', 'checksums', 'no manifest' or 'damaged'.
        problems: what is wrong with it.
    """

    path: Path
    header: Header | None
    size: int
    saved: float
    verified: str
    problems: list[str]

    @property
    def name(self) -> str:
        """The tag; a directory that stepped aside for a save that died stands in for it."""
        name = self.path.name
        return tag_of_aside(self.path) if name.startswith(ASIDE) else name


def examine(path: Path, contents: bool) -> Examined:
    """Checks that a tag's files are there with their sizes and, if asked to, their checksums.

    A tag that a run replaces meanwhile is examined again: it is not damaged.

    Raises:
        FileNotFoundError: when the tag has gone meanwhile.
        OSError: when the directory cannot be read.
    """
    last = None
    for _ in range(_REPLACED):
        before = _identity(path)
        try:
            found = _examine(path, contents)
        except FileNotFoundError:
            if before is not None and _identity(path) == before:
                raise
            time.sleep(_BETWEEN)
            continue
        if found.verified in ('sizes', 'checksums'):
            return found
        if before is not None and before == _identity(path) and (before[2] or found == last):
            return found  # without a header it is the same where twice the same was found
        last = found
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _identity(path: Path) -> tuple[int, int, str] | None:
    """Of what has the name now; None where nothing has."""
    try:
        status = path.stat() if os.path.exists(path) else path.lstat()
    except OSError:
        return None
    header = header_or_none(path)
    return status.st_dev, status.st_ino, header.save if header else ''


def _examine(path: Path, contents: bool) -> Examined:
    problems: list[str] = []
    header = None
    try:
        manifest = read_manifest(path)
        header = manifest.header if manifest else None
        if manifest and contents:
            problems = _damage(path, manifest)
        elif why := problem(path):
            problems = [why]
        verified = 'no manifest' if manifest is None else 'checksums' if contents else 'sizes'
    except CheckpointError as error:
        header, problems, verified = header_or_none(path), [str(error)], ''
    try:
        saved = datetime.fromisoformat(header.saved_at).timestamp() if header else None
    except (ValueError, OverflowError, OSError):  # no time, or none that the system can tell
        saved = None
    saved = path.lstat().st_mtime if saved is None else saved
    try:
        size = sum(file_sizes(path).values())
    except OSError as error:  # no rights, a link to nowhere, no directory
        size, problems = 0, problems or [f'{path}: cannot be read: {error.strerror}']
    return Examined(path, header, size, saved, 'damaged' if problems else verified, problems)


def examine_all(output: Path, contents: bool) -> list[Examined]:
    """Examines every tag of an output directory; newest save first, plain DeepSpeed's last.

    Raises:
        CheckpointNotFound: when there is none.
    """
    found: list[Examined] = []
    for _ in range(_REPLACED):
        paths = find_tags(output)
        for path in paths:
            try:
                found.append(examine(path, contents))
            except FileNotFoundError:
                if os.path.lexists(path):
                    raise
                # a run that saves meanwhile has pruned it
        if found or not paths:
            break
    if not found:
        raise CheckpointNotFound(f'{output}: no checkpoint tag in it')
    return sorted(found, key=_recency, reverse=True)


def choose(path: Path, tag: str | None) -> tuple[list[Path], str | None]:
    """The tags that the words mean, and what auto resume would say to that.

    Without TAG: what auto resume takes, then what ``latest`` names where that is another tag.

    Raises:
        CheckpointNotFound: when there is none.
    """
    target = present(path / tag if tag else path)
    if os.path.isdir(target) and (is_tag(target) or epoch_of(target.name) is not None):
        return [target], None
    if os.path.lexists(target) and _is_named_as_tag(target):
        return [target], None
    if tag:
        have = ', '.join(sorted(shown(p.name) for p in find_tags(path))) or 'no tag'
        raise CheckpointNotFound(f'{target}: no such tag; {path} has {have}')
    there = find_tags(path)
    latest = present(path / (read_latest(path) or ''))
    try:
        resume = newest(path)
    except CheckpointNotFound as error:
        if not there:
            raise
        return ([latest] if latest in there else there), str(error)
    if resume is None or resume.path.is_file():
        raise CheckpointNotFound(f'{path}: no checkpoint tag in it')
    also = [latest] if latest in there and latest != resume.path else []
    return [resume.path, *also], resume.warning


def examine_chosen(
    path: Path, tag: str | None, contents: bool
) -> tuple[list[Examined], str | None]:
    """Examines what `choose` chooses, anew where a run has pruned that meanwhile."""
    for left in reversed(range(_REPLACED)):
        paths, warning = choose(path, tag)
        try:
            return [examine(path, contents) for path in paths], warning
        except FileNotFoundError:
            if tag or not left:
                raise
    raise AssertionError


def find_tags(output: Path) -> list[Path]:
    """What holds, or by its name should hold, a tag; in no order.

    Raises:
        CheckpointNotFound: when there is no such directory, or it is a tag itself.
    """
    if not os.path.isdir(output):
        raise CheckpointNotFound(f'{output}: no such directory')
    if is_tag(output):
        raise CheckpointNotFound(f'{output}: is a tag; name its output directory, {output.parent}')
    there = tags(output)
    found = [path for path in there if _is_named_as_tag(path) or is_tag(path)]
    odd = {Path(output, name) for name in os.listdir(output)} - set(there)
    return found + [path for path in odd if _is_named_as_tag(path)] + stand_ins(output)


def _is_named_as_tag(path: Path) -> bool:
    """Whether a name is one of our tags: of a file or a link to nowhere it is damage."""
    return path.name.startswith('ckpt_epoch_') and not path.suffix


def tree_of(examined: Examined) -> dict[str, Any]:
    """A tag with the keys that the docstring of `internvl_ds.tools.cli.ckpt` lists, for JSON."""
    names = [f.name for f in fields(Header) if f.name not in _NOT_SHOWN]
    header = asdict(examined.header) if examined.header else dict.fromkeys(names)
    first = {'tag': examined.name, 'path': str(examined.path), 'size': examined.size}
    last = {'verified': examined.verified, 'problems': examined.problems}
    return first | {name: header[name] for name in names} | last


def _damage(path: Path, manifest: Manifest) -> list[str]:
    # imports torch, which the other actions can do without
    from internvl_ds.checkpoint.tag.verify import damage, damage_of_sources

    names, found = iter(manifest.files), dict[str, list[str]]()

    def read() -> None:
        for name in names:
            found[name] = damage(path, manifest, [name])

    # Daemons: Ctrl-C waits for no file.
    threads = [threading.Thread(target=read, daemon=True) for _ in range(_READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    problems = [problem for name in sorted(manifest.files) for problem in found[name]]
    return problems or damage_of_sources(path, manifest)


def _recency(examined: Examined) -> tuple[bool, int, float]:
    header = examined.header
    return (header is not None, header.sequence if header else 0, examined.saved)
