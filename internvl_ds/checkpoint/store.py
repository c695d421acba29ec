"""An output directory of tags: stage, commit, latest, resolve, prune. Files only; knows no ranks.

A save is staged in ``.staging-TAG`` and becomes TAG by a rename once it is complete; ``latest`` is
replaced by a rename after that. What begins with a dot is never read.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from internvl_ds.checkpoint.manifest import (
    FILE_NAME,
    Manifest,
    epoch_of,
    parse_manifest,
    wrong_files,
)
from internvl_ds.checkpoint.retention import EpochTag, tags_to_prune
from internvl_ds.errors import CheckpointError, CheckpointNotFound
from internvl_ds.files import sync_directory, write_text

logger = logging.getLogger(__name__)

LATEST = 'latest'


class Resume(NamedTuple):
    """Where to resume from, and what the user should be told about the choice (or None)."""

    path: Path
    warning: str | None


def staging_path(output: Path, tag: str) -> Path:
    """Where a tag is written before it is committed."""
    return output / f'.staging-{tag}'


def begin(output: Path, tag: str) -> Path:
    """Makes an empty staging directory, removing the leftover of a save that died."""
    staging = staging_path(output, tag)
    output.mkdir(parents=True, exist_ok=True)
    if staging.exists():
        shutil.rmtree(staging)
    _restore_stepped_aside(output, tag)
    staging.mkdir()
    return staging


def abandon(output: Path, tag: str) -> None:
    """Removes a staging directory whose save failed."""
    shutil.rmtree(staging_path(output, tag), ignore_errors=True)


def file_sizes(directory: Path) -> dict[str, int]:
    """Relative name -> size in bytes of every file below a tag, the manifest left out."""
    return {
        str(path.relative_to(directory)): path.stat().st_size
        for path in sorted(directory.rglob('*'))
        if path.is_file() and path.name != FILE_NAME
    }


def next_sequence(output: Path) -> int:
    """One more than the highest sequence number among the tags that exist."""
    return 1 + max((m.sequence for m in map(_manifest_or_none, _tags(output)) if m), default=0)


def commit(output: Path, manifest: Manifest) -> Path:
    """Publishes a staged tag: manifest last, flushed, renamed; an old tag of that name goes after.

    Returns:
        The tag's directory.
    """
    staging, final = staging_path(output, manifest.tag), output / manifest.tag
    write_text(staging / FILE_NAME, json.dumps(manifest.to_json(), indent=1) + '\n')
    _flush_files(staging)
    aside = output / f'.old-{manifest.tag}'
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    staging.rename(final)
    sync_directory(output)
    shutil.rmtree(aside, ignore_errors=True)
    return final


def write_latest(output: Path, tag: str) -> None:
    """Makes ``latest`` name a committed tag."""
    write_text(output / LATEST, tag)


def prune(output: Path, keep: int) -> list[str]:
    """Removes the epoch tags that retention lets go; one that cannot be removed is a warning.

    Returns:
        The names of the tags that were removed.
    """
    removed = []
    for name in tags_to_prune(_epoch_tags(output), keep):
        aside = output / f'.old-{name}'
        try:
            # A rename first: no reader ever meets a tag with half of its files.
            (output / name).rename(aside)
            shutil.rmtree(aside)
        except OSError as error:
            logger.warning('could not remove the old checkpoint %s: %s', output / name, error)
        else:
            removed.append(name)
    return removed


def newest(output: Path) -> Resume | None:
    """The newest checkpoint of an output directory, for auto resume.

    ``latest`` decides where it names a whole tag. Where it is missing, empty or dangling the
    newest whole epoch tag is taken, else any other whole tag (one saved as best, one of plain
    DeepSpeed), with a warning: never a silent restart from scratch. Without any trace of a tag it
    is the newest .pth of the original, by the file's time.

    Returns:
        None when there is no such directory, or nothing in it that a run left.

    Raises:
        CheckpointNotFound: when there are traces of checkpoints but no whole one.
    """
    if not output.is_dir():
        return None
    latest_file = output / LATEST
    latest = latest_file.read_text(encoding='utf-8').strip() if latest_file.is_file() else None
    broken: list[str] = []
    if latest:
        named = _present(output / latest)
        problem = _problem(named)
        if problem is None:
            return Resume(named, None)
        broken.append(f'{latest_file} names {latest}, and {problem}')
    elif latest == '':
        broken.append(f'{latest_file} is empty')
    for path in _newest_first(output):
        if path.name == latest:
            continue
        problem = _problem(path)
        if problem is None:
            reason = '; '.join(broken) or f'there is no {latest_file}'
            return Resume(path, f'{reason}: resuming from {path.name} instead')
        broken.append(problem)
    if not broken:
        # The original's files: this package evaluates them, and says so when asked to resume.
        files = sorted(output.glob('*.pth'), key=lambda path: path.stat().st_mtime)
        return Resume(files[-1], None) if files else None
    raise CheckpointNotFound(
        f'{output}: checkpoints were here, but no whole one is left ({"; ".join(broken)}). '
        'Set MODEL.RESUME to a checkpoint, or give another OUTPUT (or remove the file '
        f'{LATEST}) to start from scratch.'
    )


def resolve(resume: str) -> Resume:
    """Finds what MODEL.RESUME names: a tag directory, an output directory, or a file.

    Raises:
        CheckpointNotFound: when nothing is there; names the path and the tags beside it.
        CheckpointError: when a tag is there and is not whole.
    """
    path = _present(Path(resume))
    if path.is_file():
        return Resume(path, None)
    if path.is_dir() and not _looks_like_tag(path):
        found = newest(path)
        if found is None:
            raise CheckpointNotFound(f'{path}: a directory without any checkpoint')
        return found
    if not path.is_dir():
        siblings = sorted(tag.name for tag in _tags(path.parent)) if path.parent.is_dir() else []
        raise CheckpointNotFound(
            f'{path}: no such checkpoint; {path.parent} has {", ".join(siblings) or "none"}'
        )
    problem = _problem(path)
    if problem is not None:
        raise CheckpointError(f'{problem}; it cannot be loaded')
    return Resume(path, None)


def read_manifest(tag: Path) -> Manifest | None:
    """A tag's manifest; None for a tag that plain DeepSpeed wrote.

    Raises:
        CheckpointError: when there is one and it cannot be read.
    """
    path = tag / FILE_NAME
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{path}: cannot be read: {error}') from error
    return parse_manifest(tree, str(path))


def _tags(output: Path) -> list[Path]:
    return [p for p in output.iterdir() if p.is_dir() and not p.name.startswith('.')]


def _epoch_tags(output: Path) -> list[EpochTag]:
    tags = []
    for path in _tags(output):
        epoch = epoch_of(path.name)
        if epoch is not None:
            manifest = _manifest_or_none(path)
            tags.append(EpochTag(manifest.sequence if manifest else 0, epoch, path.name))
    return tags


def _manifest_or_none(tag: Path) -> Manifest | None:
    try:
        return read_manifest(tag)
    except CheckpointError:
        return None


def _newest_first(output: Path) -> list[Path]:
    """Every tag of a directory: epoch tags from the newest on, then the others likewise."""
    epochs = [output / tag.name for tag in sorted(_epoch_tags(output), reverse=True)]
    others = [path for path in _tags(output) if path not in epochs and _looks_like_tag(path)]

    def order(path: Path) -> tuple[int, float]:
        manifest = _manifest_or_none(path)
        return (manifest.sequence if manifest else 0, path.stat().st_mtime)

    return epochs + sorted(others, key=order, reverse=True)


def _present(tag: Path) -> Path:
    """The tag, or what stepped aside for a save of that name that died before its last rename."""
    aside = tag.with_name(f'.old-{tag.name}')
    return aside if not tag.exists() and aside.is_dir() and _problem(aside) is None else tag


def _looks_like_tag(path: Path) -> bool:
    return (path / FILE_NAME).exists() or any(path.glob('*_states.pt'))


def _problem(tag: Path) -> str | None:
    """Why a tag cannot be resumed from; None where nothing speaks against it."""
    if not tag.is_dir():
        return f'{tag} does not exist'
    try:
        manifest = read_manifest(tag)
    except CheckpointError as error:
        return str(error)
    if manifest is None:
        return None if any(tag.glob('*_model_states.pt')) else f'{tag} holds no checkpoint'
    wrong = wrong_files(manifest, file_sizes(tag))
    return f'{tag}: {"; ".join(wrong[:3])}' if wrong else None


def _restore_stepped_aside(output: Path, tag: str) -> None:
    """Puts a tag back that had stepped aside for one that never came (a crash between renames)."""
    aside, final = output / f'.old-{tag}', output / tag
    if aside.is_dir() and not final.exists() and _problem(aside) is None:
        aside.rename(final)


def _flush_files(directory: Path) -> None:
    for path in directory.rglob('*'):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    sync_directory(directory)
