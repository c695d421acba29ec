"""Examines tags for the ``ckpt`` command. Files only; reads, and changes nothing."""

from __future__ import annotations

import argparse
import errno
import os
import threading
import time
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from internvl_ds.checkpoint.tag import discovery
from internvl_ds.checkpoint.tag.manifest import Header, Manifest, epoch_of
from internvl_ds.checkpoint.tag.shared import Known
from internvl_ds.errors import CheckpointError, CheckpointNotFound, shown

_REPLACED = 10  # times that a tag is examined again which a run replaces meanwhile
_BETWEEN = 0.01  # seconds: longer than a tag takes to get its name
_READERS = 4  # files read at once: enough for a disk array, and few enough for a single disk
# Of a header: said elsewhere, or of use to a load only.
_NOT_SHOWN = ('tag', 'size', 'format', 'save')


@dataclass(frozen=True)
class Examined:
    """A tag, and what its files say."""

    path: Path  # the directory
    header: Header | None  # None without a manifest, or without a readable one
    size: int  # bytes of all its files, but for the manifest
    time_of_save: float  # seconds since the epoch: the header's time, else the directory's
    verified: str  # 'sizes', 'checksums', 'no manifest', 'no source' or 'damaged'
    problems: list[str]  # what is wrong with it

    @property
    def name(self) -> str:
        """The tag; a directory that stepped aside for a save that died stands in for it."""
        name = self.path.name
        return discovery.tag_of_aside(self.path) if name.startswith(discovery.ASIDE) else name


def examine(path: Path, contents: bool, known: Known | None = None) -> Examined:
    """Checks that a tag's files are there with their sizes and, if asked to, their checksums.

    A tag that a run replaces meanwhile is examined again: it is not damaged.

    Args:
        contents: whether files are read and compared with their checksums.
        known: see `internvl_ds.checkpoint.tag.verify.damage`.

    Raises:
        FileNotFoundError: when the tag has gone meanwhile.
        OSError: when the directory cannot be read.
    """
    last = None
    for _ in range(_REPLACED):
        before = _identity(path)
        try:
            examined = _examine(path, contents, known)
        except FileNotFoundError:
            if before is not None and _identity(path) == before:
                raise
            time.sleep(_BETWEEN)
            continue
        if examined.verified in ('sizes', 'checksums'):
            return examined
        if before is not None and before == _identity(path) and (before[2] or examined == last):
            return examined  # without a header it is the same where it was the same twice
        last = examined
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _identity(path: Path) -> tuple[int, int, str] | None:
    """The identity of the tag that has the name now; None if there is none."""
    try:
        status = path.stat() if os.path.exists(path) else path.lstat()
    except OSError:
        return None
    header = discovery.header_or_none(path)
    return status.st_dev, status.st_ino, header.save if header else ''


def _examine(path: Path, contents: bool, known: Known | None) -> Examined:
    problems: list[str] = []
    header = None
    try:
        manifest = discovery.read_manifest(path)
        header = manifest.header if manifest else None
        if manifest and contents:
            problems = _damage(path, manifest, known)
        elif why := discovery.problem(path):
            problems = [why]
        verified = 'no manifest' if manifest is None else 'checksums' if contents else 'sizes'
        if manifest and contents and not problems and (problems := _sourceless(path, manifest)):
            verified = 'no source'
    except CheckpointError as error:
        header, problems, verified = discovery.header_or_none(path), [str(error)], ''
    try:
        seconds = datetime.fromisoformat(header.saved_at).timestamp() if header else None
    except (ValueError, OverflowError, OSError):  # no time, or none that the system can tell
        seconds = None
    seconds = path.lstat().st_mtime if seconds is None else seconds
    try:
        size = sum(discovery.file_sizes(path).values())
    except OSError as error:  # no rights, a link to nowhere, no directory
        size, problems = 0, problems or [f'{path}: cannot be read: {error.strerror}']
    verified = 'damaged' if problems and verified != 'no source' else verified
    return Examined(path, header, size, seconds, verified, problems)


def examine_all(output: Path, contents: bool) -> list[Examined]:
    """Examines every tag of an output directory; newest save first, plain DeepSpeed's last.

    Raises:
        CheckpointNotFound: when there is none.
    """
    results: list[Examined] = []
    known: Known = {}
    for _ in range(_REPLACED):
        paths = find_tags(output)
        for path in paths:
            try:
                results.append(examine(path, contents, known))
            except FileNotFoundError:
                if os.path.lexists(path):
                    raise
                # a run that saves meanwhile has pruned it
        if results or not paths:
            break
    if not results:
        raise CheckpointNotFound(f'{output}: no checkpoint tag in it')
    return sorted(results, key=_recency, reverse=True)


def choose(path: Path, tag: str | None) -> tuple[list[Path], str | None]:
    """The tags that the words mean, and auto resume's message about the choice.

    Without TAG: what auto resume takes, then what ``latest`` names where that is another tag.

    Raises:
        CheckpointNotFound: when there is none.
    """
    target = discovery.present(path / tag if tag else path)
    if os.path.isdir(target) and (discovery.is_tag(target) or epoch_of(target.name) is not None):
        return [target], None
    if os.path.lexists(target) and _is_named_as_tag(target):
        return [target], None
    paths = find_tags(path)
    if tag:
        names = ', '.join(sorted(shown(p.name) for p in paths)) or 'no tag'
        raise CheckpointNotFound(f'{target}: no such tag; {path} has {names}')
    latest = discovery.present(path / (discovery.read_latest(path) or ''))
    try:
        resume = discovery.newest(path)
    except CheckpointNotFound as error:
        if not paths:
            raise
        return ([latest] if latest in paths else paths), str(error)
    if resume is None or resume.path.is_file():
        raise CheckpointNotFound(f'{path}: no checkpoint tag in it')
    also = [latest] if latest in paths and latest != resume.path else []
    return [resume.path, *also], resume.warning


def examine_chosen(
    path: Path, tag: str | None, contents: bool
) -> tuple[list[Examined], str | None]:
    """Examines the tags of `choose`; again if a run prunes them meanwhile."""
    for retries in reversed(range(_REPLACED)):
        paths, warning = choose(path, tag)
        try:
            return [examine(path, contents) for path in paths], warning
        except FileNotFoundError:
            if tag or not retries:
                raise
    raise AssertionError


def find_tags(output: Path) -> list[Path]:
    """The paths that hold a tag, or should by their names; in no order.

    Raises:
        CheckpointNotFound: when there is no such directory, or it is a tag itself.
    """
    if not os.path.isdir(output):
        raise CheckpointNotFound(f'{output}: no such directory')
    if discovery.is_tag(output):
        raise CheckpointNotFound(f'{output}: is a tag; name its output directory, {output.parent}')
    folders = discovery.tags(output)
    paths = [path for path in folders if _is_named_as_tag(path) or discovery.is_tag(path)]
    odd = {Path(output, name) for name in os.listdir(output)} - set(folders)
    paths += [path for path in odd if _is_named_as_tag(path)]
    return paths + discovery.stand_ins(output)


def _is_named_as_tag(path: Path) -> bool:
    """Whether a name is one of our tags; a file or a dead link of such a name is damage."""
    return path.name.startswith('ckpt_epoch_') and not path.suffix


def add_pretrained(parser: argparse.ArgumentParser) -> None:
    """Adds the option of the actions that read omitted parameters."""
    text = 'where the weights are now that a tag omits (CHECKPOINT.FROZEN omit); may be repeated'
    parser.add_argument('--pretrained', action='append', metavar='FILE', help=text)


def tree_of(examined: Examined) -> dict[str, Any]:
    """A tag with the keys that the docstring of `internvl_ds.tools.cli.ckpt` lists, for JSON."""
    names = [f.name for f in fields(Header) if f.name not in _NOT_SHOWN]
    header = asdict(examined.header) if examined.header else dict.fromkeys(names)
    first = {'tag': examined.name, 'path': str(examined.path), 'size': examined.size}
    last = {'verified': examined.verified, 'problems': examined.problems}
    return first | {name: header[name] for name in names} | last


def _damage(path: Path, manifest: Manifest, known: Known | None) -> list[str]:
    # imports torch, which the other actions can do without
    from internvl_ds.checkpoint.tag.verify import damage

    names, problems = iter(manifest.files), dict[str, list[str]]()

    def read() -> None:
        for name in names:
            problems[name] = damage(path, manifest, [name], known)

    # Daemons: Ctrl-C waits for no file.
    threads = [threading.Thread(target=read, daemon=True) for _ in range(_READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [problem for name in sorted(manifest.files) for problem in problems[name]]


def _sourceless(path: Path, manifest: Manifest) -> list[str]:
    """Why a tag's omitted parameters cannot be read; its own files are right."""
    from internvl_ds.checkpoint.tag.verify import damage_of_sources

    return damage_of_sources(path, manifest)


def _recency(examined: Examined) -> tuple[bool, int, float]:
    header = examined.header
    return (header is not None, header.sequence if header else 0, examined.time_of_save)
