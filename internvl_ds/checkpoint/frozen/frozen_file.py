"""The file of frozen parameters: .safetensors whose bytes follow from the tensors alone.

So its digest is known before it is written, and names it: what has the name already need not be
written again.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from internvl_ds.checkpoint.formats.tensor_files import load_safetensors
from internvl_ds.checkpoint.frozen.frozen_bytes import bytes_of
from internvl_ds.checkpoint.frozen.model_file import KEY, join
from internvl_ds.checkpoint.frozen.sources import Omitted, take
from internvl_ds.checkpoint.tag.hashing import write_hashed
from internvl_ds.checkpoint.tag.manifest import FileEntry, is_shared, wrong_files
from internvl_ds.checkpoint.tag.places import place_of
from internvl_ds.errors import CheckpointError, brief
from internvl_ds.files import flush
from internvl_ds.files.reading import interpreting


class FrozenFile(NamedTuple):
    """The frozen parameters that one rank writes.

    Attributes:
        entry: size and digest that the file must have.
        tensors: name -> values.
    """

    entry: tuple[int, str]
    tensors: dict[str, torch.Tensor]


def write(frozen: FrozenFile, path: Path) -> None:
    """Writes and flushes the file aside, then renames it.

    Raises:
        OSError: when it cannot be written.
        CheckpointError: when the values are not those any more that ``entry`` is of.
    """
    aside = path.with_name(f'.internvl_ds-{secrets.token_hex(8)}.tmp')  # see `replacing`

    def fill(file: Any) -> None:
        for piece in bytes_of(frozen.tensors):
            file.write(piece)

    try:
        entry = write_hashed(aside, fill)
        if entry != FileEntry(*frozen.entry):
            raise CheckpointError(
                f'{path}: frozen parameters changed while they were saved: hold still what is '
                "frozen during a save, or set CHECKPOINT.FROZEN to 'keep'"
            )
        aside.replace(path)
        flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def joined(tag: Path, where: Path, content: Any, *, outline: bool = False) -> Any:
    """The content of a model file with its frozen parameters, mapped from their own files.

    Of a tag that omits them KEY stays in it, which says where they were found ('places').

    Args:
        tag: the directory, or the staging directory of a save under way.
        where: the model file.
        content: of it; returned as it is where nothing was taken out.
        outline: whether omitted parameters need no memory, nor their source.

    Raises:
        CheckpointError: names the file that is missing, cannot be read or is another.
    """
    apart = content.get(KEY)
    if apart is None:
        return content
    with interpreting(where, CheckpointError):
        sharded = bool(apart['sharded'])
        if 'omitted' in apart:
            omitted = {str(name): Omitted.of(said) for name, said in apart['omitted'].items()}
            if outline:
                return join(content, {n: o.outline(sharded=sharded) for n, o in omitted.items()})
            tensors, places = take(tag, omitted, apart['digests'], sharded=sharded)
            return {**join(content, tensors), KEY: {**apart, 'places': places}}
        name = apart['file']
        if not (isinstance(name, str) and is_shared(name)):
            raise CheckpointError(f'{where}: says that its frozen parameters are in {brief(name)}')
        return join(content, _read(tag, name, str(apart.get('output', ''))))


def _read(tag: Path, name: str, lay_in: str) -> dict[str, torch.Tensor]:
    path = place_of(tag, name)
    if not os.path.lexists(path):
        raise CheckpointError(f'{tag}: {wrong_files({name: FileEntry(0, "")}, {}, lay_in)[0]}')
    try:
        return load_safetensors(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f'{path}: cannot be read: {error}') from error
