"""Finding checkpoints in an output directory. Reads only; knows no ranks.

Names that begin with a dot are never checkpoints, but for ``.old-TAG-ID``: the tag that stepped
aside for a save of the same name, which stands in for it if that save died between its two renames.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from internvl_ds.checkpoint.tag import manifest as manifests
from internvl_ds.checkpoint.tag.manifest import FILE_NAME, Header, Manifest, epoch_of
from internvl_ds.checkpoint.tag.places import place_of
from internvl_ds.checkpoint.tag.retention import EpochTag
from internvl_ds.errors import CheckpointError, CheckpointNotFound, brief, shown
from internvl_ds.files.reading import JSON_BYTES, NAME_BYTES, Unreadable, open_data, read_text

LATEST = 'latest'
ASIDE = '.old-'


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError of a block into a CheckpointError."""
    try:
        yield
    except CheckpointError:  # CheckpointNotFound is an OSError
        raise
    except OSError as error:
        where = error.filename or path
        raise CheckpointError(f'{where}: cannot be read: {error.strerror}') from error


class Resume(NamedTuple):
    """Where to resume from, and a message about the choice (or None)."""

    path: Path
    warning: str | None


def newest(output: Path, damages: Mapping[str, str] | None = None) -> Resume | None:
    """The newest checkpoint of an output directory, for auto resume.

    ``latest`` decides where it names a tag whose files are all there with the right sizes. Where it
    does not, the newest such epoch tag is taken, else any other such tag (one saved as best, one of
    plain DeepSpeed), with a warning: never a silent restart from scratch. Without any trace of a
    tag it is the newest .pth of the original, by the file's time.

    Args:
        output: the directory.
        damages: directory name -> what is wrong with it, of tags to pass over.

    Returns:
        None when there is no such directory, or nothing in it that a run left.

    Raises:
        CheckpointNotFound: when there are traces of checkpoints but no whole one.
        CheckpointError: when the directory cannot be read.
    """
    with reading(output):
        return _newest(output, damages or {})


def _newest(output: Path, damages: Mapping[str, str]) -> Resume | None:
    if not output.is_dir():
        return None
    latest_file, latest = output / LATEST, read_latest(output)
    problems: list[str] = []
    if latest:
        tag = present(output / latest)
        why = damages.get(tag.name) or problem(tag)
        if why is None:
            return Resume(tag, None)
        problems.append(f'{latest_file} names {latest}, and {why}')
    elif latest == '':
        problems.append(f'{latest_file} {_why_not_latest(output)}')
    for path in _newest_first(output):
        if path.name == latest:
            continue
        why = damages.get(path.name) or problem(path)
        if why is None:
            reason = '; '.join(problems) or f'there is no {latest_file}'
            return Resume(path, f'{reason}: resuming from {shown(path.name)} instead')
        problems.append(why)
    if not problems:
        originals = (path for path in output.glob('*.pth') if path.is_file())
        files = sorted(originals, key=lambda path: path.stat().st_mtime)
        return Resume(files[-1], None) if files else None
    raise CheckpointNotFound(
        f'{output}: checkpoints were here, but no whole one is left ({"; ".join(problems)}). '
        'Set MODEL.RESUME to a checkpoint, or give another OUTPUT (or remove the file '
        f'{LATEST}) to start from scratch.'
    )


def resolve(resume: str) -> Path:
    """What MODEL.RESUME names: a file, an output directory, or a tag with files of the right sizes.

    Raises:
        CheckpointNotFound: when nothing is there; names the path and the tags beside it.
        CheckpointError: when a tag is there and is not whole.
    """
    path = present(Path(resume))
    # os.path's take a name that no file can have for one of nothing.
    if os.path.isfile(path) or (os.path.isdir(path) and not is_tag(path)):
        return path
    if not os.path.isdir(path):
        with reading(path.parent):
            siblings = tags(path.parent) if os.path.isdir(path.parent) else []
        names = ', '.join(sorted(shown(tag.name) for tag in siblings)) or 'none'
        raise CheckpointNotFound(f'{path}: no such checkpoint; {path.parent} has {names}')
    why = problem(path)
    if why is not None:
        raise CheckpointError(f'{why}; it cannot be loaded')
    return path


def tags(output: Path) -> list[Path]:
    """Every directory below ``output`` that could be a tag, in no order."""
    with os.scandir(output) as entries:
        names = [e.path for e in entries if not e.name.startswith('.')]
    return [Path(name) for name in names if os.path.isdir(name)]  # a link to itself is none


def epoch_tags(output: Path) -> list[EpochTag]:
    """The epoch and step tags with the values that retention compares, in no order."""
    entries = []
    for path in tags(output):
        epoch = epoch_of(path.name)
        if epoch is not None:
            header, step = header_or_none(path), manifests.step_of(path.name)
            sequence = header.sequence if header else 0
            accuracy = header.max_accuracy if header else None
            updates = header.global_steps if header and step is not None else None
            entries.append(EpochTag(sequence, epoch, path.name, accuracy, step, updates))
    return entries


def removable_tags(output: Path) -> list[EpochTag]:
    """As `epoch_tags`, oldest save first, without a user's directory that has such a name."""
    return sorted(t for t in epoch_tags(output) if is_tag(output / t.name))


def is_tag(path: Path) -> bool:
    """Whether a directory holds a checkpoint, whole or not, of ours or of plain DeepSpeed.

    One that may not be read, such as lost+found, holds none.
    """
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return any(name == FILE_NAME or name.endswith('_states.pt') for name in names)


def read_manifest(tag: Path) -> Manifest | None:
    """A tag's manifest, or a CheckpointError; None for a tag that plain DeepSpeed wrote."""
    path = tag / FILE_NAME
    try:
        text = read_text(path, JSON_BYTES)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise CheckpointError(f'{path}: is a link to nothing') from error
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{path}: cannot be read: {error}') from error
    return manifests.parse_manifest(text, str(path))


def read_header(tag: Path) -> Header | None:
    """The front of a tag's manifest, however many files it lists; else as `read_manifest`."""
    path = tag / FILE_NAME
    try:
        with open_data(path) as file:
            front = file.read(manifests.HEADER_BYTES) or b''
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{path}: cannot be read: {error}') from error
    header = manifests.parse_header(front.decode(errors='replace'), str(path))
    if header is not None:
        return header
    manifest = read_manifest(tag)
    return manifest.header if manifest else None


def header_or_none(tag: Path) -> Header | None:
    """As `read_header`, with None where it cannot be read."""
    try:
        return read_header(tag)
    except CheckpointError:
        return None


def file_sizes(directory: Path) -> dict[str, int]:
    """Relative name -> size in bytes of every file below a tag, the manifest left out.

    A link to a file is that file; what is no regular file, and leads to none, has size -1. A file
    that goes while this looks is left out: a mark is written into a tag before it is removed.
    """
    sizes = {}
    pending = [(directory, '')]
    while pending:
        folder, prefix = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append((Path(entry.path), f'{prefix}{entry.name}/'))
                elif entry.name != FILE_NAME and (size := _size(entry)) is not None:
                    sizes[f'{prefix}{entry.name}'] = size
    return sizes


def sizes_of(tag: Path, files: Iterable[str]) -> dict[str, int]:
    """As `file_sizes`, with the ``files`` that lie next to the tag."""
    sizes = file_sizes(tag)
    for name in files:
        if name not in sizes and os.path.isfile(path := place_of(tag, name)):
            sizes[name] = path.stat().st_size
    return sizes


def _size(entry: os.DirEntry[str]) -> int | None:
    try:
        status = entry.stat()
    except FileNotFoundError:
        return -1 if entry.is_symlink() else None
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def problem(tag: Path) -> str | None:
    """Why a tag cannot be resumed from, by its manifest and the sizes of its files; None if it can.

    Contents are not read: `internvl_ds.checkpoint.tag.verify` does that.
    """
    try:
        if not tag.is_dir():
            return f'{tag} is no directory' if os.path.lexists(tag) else f'{tag} does not exist'
        manifest = read_manifest(tag)
        if manifest is None:
            if (tag / manifests.STATE_FILE).exists():  # plain DeepSpeed writes none
                return f'{tag}: {FILE_NAME} is missing'
            is_whole = any(name.endswith('_model_states.pt') for name in os.listdir(tag))
            return None if is_whole else f'{tag} holds no checkpoint'
        lay_in = manifest.header.frozen.get('output', '')
        wrong = manifests.wrong_files(manifest.files, sizes_of(tag, manifest.files), lay_in)
        return f'{tag}: {"; ".join(wrong[:3])}' if wrong else None
    except CheckpointError as error:
        return str(error)
    except OSError as error:  # no rights, a link to nowhere, a failing disk
        return f'{tag}: cannot be read: {error}'


def present(tag: Path) -> Path:
    """The tag, or its old copy that a save moved aside and died before its last rename."""
    try:
        if tag.exists():
            return tag
    except OSError:  # no rights, or a name that no file can have
        return tag
    asides = [p for p in sorted(tag.parent.glob(f'{ASIDE}*')) if tag_of_aside(p) == tag.name]
    return next((path for path in asides if problem(path) is None), tag)


def aside_of(tag: Path, save: str) -> Path:
    """The name of an old tag while the save of that id replaces it."""
    return tag.with_name(f'{ASIDE}{tag.name}-{save}')


def tag_of_aside(aside: Path) -> str:
    """Reverses `aside_of`; earlier versions appended no id."""
    return re.sub('-[0-9a-f]{16}$', '', aside.name.removeprefix(ASIDE))


def stand_ins(output: Path) -> list[Path]:
    """The tags moved aside whose successor is missing: they stand in for it."""
    names = dict.fromkeys(map(tag_of_aside, sorted(output.glob(f'{ASIDE}*'))))
    return [path for name in names if (path := present(output / name)) != output / name]


def read_latest(output: Path) -> str | None:
    """The tag that `latest` names; None without that file, '' where it names none."""
    try:
        return _named_by(output / LATEST)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return ''  # there, and naming nothing


def _named_by(latest_file: Path) -> str:
    name = read_text(latest_file, NAME_BYTES, ours=True).strip()
    if Path(name).name != name or name.startswith('.') or shown(name) != name or len(name) > 255:
        raise Unreadable(f'names {brief(name)}, which is no tag beside it')
    return name


def _why_not_latest(output: Path) -> str:
    try:
        return 'is empty' if not _named_by(output / LATEST) else 'has changed meanwhile'
    except (OSError, ValueError) as error:
        return str(error)


def _newest_first(output: Path) -> list[Path]:
    """Every tag of a directory: epoch tags, newest first, then the others, newest first."""
    epochs = [output / t.name for t in sorted(epoch_tags(output), key=lambda t: t[:3])[::-1]]
    names = {path.name for path in epochs}
    others = [path for path in tags(output) if path.name not in names and is_tag(path)]
    others += stand_ins(output)

    def order(path: Path) -> tuple[int, float]:
        header = header_or_none(path)
        try:
            return (header.sequence if header else 0, path.stat().st_mtime)
        except OSError:  # a run has just replaced it, or it is a link to itself
            return (0, 0.0)

    return epochs + sorted(others, key=order, reverse=True)
