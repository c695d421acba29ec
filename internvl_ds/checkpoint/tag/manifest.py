"""The name and the manifest of a tag, and the comparison of files with the manifest. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import xxhash

from internvl_ds.errors import CheckpointError, brief, shown
from internvl_ds.files.reading import interpreting, parse_json

FILE_NAME = 'manifest.json'
STATE_FILE = 'state.json'
LOOP_FILE = 'loop_rank_{}.json'
FORMAT = 2
# Of a tag whose frozen parameters stand apart, which earlier versions cannot read.
FORMAT_APART = 3
# Of a tag with files of an earlier save, which earlier versions take for those of another tag.
FORMAT_LINKED = 4

# A header is read from this many bytes at the front of the file.
HEADER_BYTES = 4096

_EPOCH_TAG = re.compile(r'ckpt_epoch_(0|[1-9]\d*)(?:_step_([1-9]\d*))?')
_BEST_NAME = re.compile(r'[A-Za-z_][A-Za-z0-9_.-]*')
_FILE_RANK = re.compile(r'(?:pp_rank|ema_rank|loop_rank|frozen_rank)_(\d+)')
_SHARED_FILE = re.compile(r'frozen_rank_\d+-[0-9a-f]{32}\.safetensors')
_NAME_LENGTH = 255
_FILES = ',\n "files": {'
_DIGEST = ',\n "xxh3_128": "'
# Fields of the header that the manifests of earlier versions lack.
_LATER = ('step', 'save', 'frozen', 'linked')


class FileEntry(NamedTuple):
    """Size in bytes and xxh3-128 digest (32 hexadecimal digits) of a file."""

    size: int
    digest: str


@dataclass(frozen=True)
class Header:
    """The description of a tag without its list of files: the front of a manifest, quick to read.

    Attributes:
        tag: the directory's name when it was saved.
        epoch: the epoch that the tag was saved after, or in; None where the caller's is no int.
        max_accuracy: the best accuracy at that time.
        sequence: counts the saves of an output directory, so that "newest" needs no clock.
        saved_at: when it was committed, UTC, ISO 8601.
        zero_stage, world_size, precision: the layout of the shards.
        global_steps: updates that the engine had counted.
        size: of all files together, bytes.
        versions: of this package, torch and deepspeed.
        format: of this file.
        step: updates of the epoch, of a tag that was saved inside it; else None.
        save: names the save among all others; every file of the tag says it too. '' in tags of
            earlier versions.
        frozen: where the frozen parameters are that stand apart: see CHECKPOINT.FROZEN; empty where
            none do.
        linked: of files that this save links, because an earlier one had written the same bytes:
            `save` -> `tag` of what wrote them, as they say themselves; empty where it wrote all.
    """

    tag: str
    epoch: int | None
    max_accuracy: float
    sequence: int
    saved_at: str
    zero_stage: int
    world_size: int
    precision: str
    global_steps: int
    size: int
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT
    step: int | None = None
    save: str = ''
    frozen: dict[str, str] = field(default_factory=dict)
    linked: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Identity:
    """The save and rank of a file; kept inside the file, unlike its name and checksum.

    Attributes:
        tag: as it was called when it was saved.
        save: `Header.save`.
        rank: who wrote the file.
    """

    tag: str
    save: str
    rank: int

    KEY: ClassVar[str] = 'internvl_ds'

    def to_dict(self) -> dict[str, str]:
        """The form in a file: text values, which every format can keep."""
        return {'tag': self.tag, 'save': self.save, 'rank': str(self.rank)}

    @staticmethod
    def describe(entry: Any) -> str:
        """The identity in words."""
        entry = entry if isinstance(entry, Mapping) else {}
        rank, save, tag = (brief(entry.get(key)).strip("'") for key in ('rank', 'save', 'tag'))
        return f"rank {rank}'s file of save {save} of {tag}"


@dataclass(frozen=True)
class Manifest:
    """Written last into a tag: a directory that has one was complete when it was committed.

    Attributes:
        header: what the tag is.
        files: name -> size and digest, of every file but the manifest.
    """

    header: Header
    files: Mapping[str, FileEntry]

    def to_text(self) -> str:
        """The manifest as JSON whose last key is the digest of all the text before it."""
        tree = {**asdict(self.header), 'files': {n: list(e) for n, e in self.files.items()}}
        return _with_digest(json.dumps(tree, indent=1).removesuffix('\n}'))


def parse_header(front: str, where: str) -> Header | None:
    """Reads the header from the first HEADER_BYTES of a manifest; no checksum is verified.

    Returns None where the header is longer than that, or not as `Manifest.to_text` writes it; else
    as `parse_manifest`.
    """
    head, separator, _ = front.partition(_FILES)
    if not separator:
        return None
    try:
        return _header(parse_json(head + '\n}'), where)
    except ValueError as error:
        raise CheckpointError(f'{where}: not a checkpoint manifest: {error}') from error


def parse_manifest(text: str, where: str) -> Manifest:
    """Reverses `Manifest.to_text`; CheckpointError, naming ``where``, for any other text."""
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f'{where}: not a checkpoint manifest: {error}') from error
    header = _header(tree, where)
    if text != _with_digest(text.rpartition(_DIGEST)[0]):
        raise CheckpointError(f'{where}: damaged: its own xxh3-128 is another')
    try:
        files = {n: FileEntry(*entry) for n, entry in tree['files'].items()}
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f'{where}: the manifest has no list of files: {error}') from error
    for name, (size, digest) in files.items():
        inside = name and all(part not in ('', '.', '..') for part in name.split('/'))
        if not inside or '\0' in name:
            raise CheckpointError(f'{where}: lists {brief(name)}, which is no file of a tag')
        if not (_is_count(size) and isinstance(digest, str)):
            raise CheckpointError(f'{where}: {shown(name)} has {brief([size, digest])}')
    return Manifest(header, files)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# What the fields of a header may be: ranks are counted through, accuracies are printed.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(('tag', 'saved_at', 'precision', 'save'), _is_text),
    **dict.fromkeys(('sequence', 'global_steps', 'size', 'format'), _is_count),
    'epoch': lambda v: v is None or _is_count(abs(v)),
    'step': lambda v: v is None or _is_count(v),
    'max_accuracy': _is_number,
    'zero_stage': lambda v: _is_count(v) and v <= 3,
    'world_size': lambda v: _is_count(v) and 0 < v <= 1 << 20,
    **dict.fromkeys(
        ('versions', 'frozen', 'linked'),
        lambda v: isinstance(v, dict) and all(map(_is_text, v.values())),
    ),
}


def _with_digest(body: str) -> str:
    return f'{body}{_DIGEST}{xxhash.xxh3_128(body.encode()).hexdigest()}"\n}}\n'


def _header(tree: Any, where: str) -> Header:
    if not isinstance(tree, Mapping) or not isinstance(tree.get('format'), int):
        raise CheckpointError(f'{where}: not a checkpoint manifest')
    if tree['format'] not in (FORMAT, FORMAT_APART, FORMAT_LINKED):
        newer = f'and this version reads up to {FORMAT_LINKED}: upgrade internvl_ds'
        older = 'of a development version without checksums, and this version does not read it'
        other = newer if tree['format'] > FORMAT else older
        raise CheckpointError(f'{where}: manifest format {brief(tree["format"])}, {other}')
    try:
        values = {f.name: tree[f.name] for f in fields(Header) if f.name not in _LATER}
    except KeyError as error:
        raise CheckpointError(f'{where}: the manifest lacks {error}') from error
    values |= {name: tree[name] for name in _LATER if name in tree}
    for name, value in values.items():
        with interpreting(f'{where}: {name} is {brief(value)}', CheckpointError):
            if not _FIELDS[name](value):
                raise TypeError('of another kind')
    return Header(**values)


def wrong_files(
    files: Mapping[str, FileEntry], sizes: Mapping[str, int], lay_in: str = ''
) -> list[str]:
    """Names each of ``files`` that is missing, no regular file (size -1) or of another size.

    Args:
        files: of a tag.
        sizes: of what is there.
        lay_in: the directory that the tag was saved in.
    """
    wrong = []
    for name, entry in sorted(files.items()):
        if name not in sizes:
            wrong.append(f'{shown(name)} is missing{_missing_since(name, lay_in)}')
        elif sizes[name] < 0:
            wrong.append(f'{shown(name)} is no regular file, nor a link to one')
        elif sizes[name] != entry.size:
            wrong.append(f'{shown(name)} has {sizes[name]} bytes, not {entry.size}')
    return wrong


def _missing_since(name: str, lay_in: str) -> str:
    if not is_shared(name):
        return ''
    return (
        ': it holds frozen parameters that this tag shares with others, and was in them or beside '
        f'them in {shown(lay_in)}; put it into the tag, or next to it'
    )


def shared_name(rank: int, digest: str) -> str:
    """The name of a rank's frozen parameters in CHECKPOINT.FROZEN 'once': it has their digest."""
    return f'frozen_rank_{rank}-{digest}.safetensors'


def is_shared(name: str) -> bool:
    """Whether several tags may have the file: see `shared_name`."""
    return bool(_SHARED_FILE.fullmatch(name))


def file_rank(name: str) -> int:
    """The rank whose shard a file is; 0 for a file of no rank."""
    match = _FILE_RANK.search(name[-_NAME_LENGTH:])
    return int(match.group(1)) if match else 0


def tag_name(epoch: Any, best: str | None, step: int | None = None) -> str:
    """The tag of a save: ``ckpt_epoch_{epoch}``, ``ckpt_epoch_{epoch}_step_{step}`` inside an
    epoch, or ``ckpt_epoch_{best}`` where best is given.

    Raises:
        CheckpointError: for a name that is no plain file name, or that reads as an epoch.
    """
    if best is None:
        if isinstance(epoch, int) and epoch < 0:
            raise CheckpointError(f'epoch is {epoch}: it cannot be negative')
        if step is not None:
            if not isinstance(epoch, int) or step < 1:
                raise CheckpointError(f'epoch {epoch!r}, step {step!r}: a step is one of an epoch')
            return f'ckpt_epoch_{epoch}_step_{step}'
        if isinstance(epoch, int):
            return f'ckpt_epoch_{epoch}'
        best = epoch
    if not isinstance(best, str) or not _BEST_NAME.fullmatch(best):
        raise CheckpointError(
            f"a tag is named by letters, digits, '_', '-' and '.', beginning with a letter, as in "
            f"best='best'; got {best!r}"
        )
    return f'ckpt_epoch_{best}'


def epoch_of(tag: str) -> int | None:
    """The epoch in an epoch or step tag's name; None for 'ckpt_epoch_best' and others."""
    match = _EPOCH_TAG.fullmatch(tag)
    return int(match[1]) if match else None


def step_of(tag: str) -> int | None:
    """The step in a step tag's name; None for all others, epoch tags among them."""
    match = _EPOCH_TAG.fullmatch(tag)
    return int(match[2]) if match and match[2] else None
