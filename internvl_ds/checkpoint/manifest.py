"""What a tag holds: its name, its manifest, and whether files are what that says. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from internvl_ds.errors import CheckpointError

FILE_NAME = 'manifest.json'
STATE_FILE = 'state.json'
FORMAT = 1

_EPOCH_TAG = re.compile(r'ckpt_epoch_(0|[1-9]\d*)')
_BEST_NAME = re.compile(r'[A-Za-z_][A-Za-z0-9_.-]*')


@dataclass(frozen=True)
class Manifest:
    """Written last into a tag: a directory that has one was complete when it was committed.

    Attributes:
        tag: the directory's name.
        epoch: the epoch that the tag was saved after; None where the caller's is no int.
        sequence: counts the saves of an output directory, so that "newest" needs no clock.
        zero_stage, world_size, precision: the layout of the shards.
        global_steps: updates that the engine had counted.
        files: name -> size in bytes, of every file but the manifest.
        versions: of this package, torch and deepspeed.
        format: of this file.
    """

    tag: str
    epoch: int | None
    sequence: int
    zero_stage: int
    world_size: int
    precision: str
    global_steps: int
    files: dict[str, int]
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON types."""
        return asdict(self)


def parse_manifest(tree: Any, where: str) -> Manifest:
    """Reads what `Manifest.to_json` gave.

    Args:
        tree: parsed JSON.
        where: the file's path, for the error.

    Raises:
        CheckpointError: when it is no manifest, or one of a newer format.
    """
    if not isinstance(tree, Mapping) or not isinstance(tree.get('format'), int):
        raise CheckpointError(f'{where}: not a checkpoint manifest')
    if tree['format'] > FORMAT:
        raise CheckpointError(
            f'{where}: manifest format {tree["format"]}, and this version reads up to {FORMAT}: '
            'upgrade internvl_ds'
        )
    try:
        return Manifest(**{name: tree[name] for name in Manifest.__dataclass_fields__})
    except KeyError as error:
        raise CheckpointError(f'{where}: the manifest lacks {error}') from error


def wrong_files(manifest: Manifest, sizes: Mapping[str, int]) -> list[str]:
    """Names each file that is missing or of another size than the manifest says."""
    wrong = []
    for name, size in sorted(manifest.files.items()):
        if name not in sizes:
            wrong.append(f'{name} is missing')
        elif sizes[name] != size:
            wrong.append(f'{name} has {sizes[name]} bytes, not {size}')
    return wrong


def tag_name(epoch: Any, best: str | None) -> str:
    """The tag of a save: ``ckpt_epoch_{epoch}``, or ``ckpt_epoch_{best}`` where best is given.

    Raises:
        CheckpointError: for a name that is no plain file name, or that reads as an epoch.
    """
    if best is None:
        if isinstance(epoch, int) and epoch < 0:
            raise CheckpointError(f'epoch is {epoch}: it cannot be negative')
        best = str(epoch) if isinstance(epoch, int) else epoch
        if isinstance(epoch, int):
            return f'ckpt_epoch_{epoch}'
    if not isinstance(best, str) or not _BEST_NAME.fullmatch(best):
        raise CheckpointError(
            f"a tag is named by letters, digits, '_', '-' and '.', beginning with a letter, as in "
            f"best='best'; got {best!r}"
        )
    return f'ckpt_epoch_{best}'


def epoch_of(tag: str) -> int | None:
    """The epoch in an epoch tag's name; None for 'ckpt_epoch_best' and other directories."""
    match = _EPOCH_TAG.fullmatch(tag)
    return int(match.group(1)) if match else None
