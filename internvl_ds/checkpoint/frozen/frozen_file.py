"""The file of frozen parameters: .safetensors whose bytes follow from the tensors alone.

So its digest is known before it is written, and names it: what has the name already need not be
written again.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError

from internvl_ds.checkpoint.formats.tensor_files import load_safetensors, safetensors_header
from internvl_ds.checkpoint.frozen.model_file import KEY, join
from internvl_ds.checkpoint.tag.hashing import write_hashed
from internvl_ds.checkpoint.tag.manifest import FileEntry, is_shared, wrong_files
from internvl_ds.checkpoint.tag.places import place_of
from internvl_ds.errors import CheckpointError, brief
from internvl_ds.files import flush
from internvl_ds.files.reading import interpreting

_PIECE = 64 << 20  # bytes that are copied from a GPU at a time


class FrozenFile(NamedTuple):
    """The frozen parameters that one rank writes.

    Attributes:
        entry: size and digest that the file must have.
        tensors: name -> values.
    """

    entry: tuple[int, str]
    tensors: dict[str, torch.Tensor]


def entry_of(tensors: Mapping[str, torch.Tensor]) -> FileEntry:
    """The size and digest of the file that these would be, which is not written."""
    digest, size = xxhash.xxh3_128(), 0
    for piece in _pieces(tensors):
        digest.update(piece)
        size += len(piece)
    return FileEntry(size, digest.hexdigest())


def write(frozen: FrozenFile, path: Path) -> None:
    """Writes and flushes the file; it has the name when it is whole.

    Raises:
        OSError: when it cannot be written.
        CheckpointError: when the values are not those any more that ``entry`` is of.
    """
    aside = path.with_name(f'.internvl_ds-{secrets.token_hex(8)}.tmp')  # see `replacing`

    def fill(file: Any) -> None:
        for piece in _pieces(frozen.tensors):
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


def joined(tag: Path, where: Path, content: Any) -> Any:
    """What a model file holds, its frozen parameters put back, mapped from where they lie.

    Args:
        tag: the directory, or the staging directory of a save under way.
        where: the model file.
        content: of it; returned as it is where nothing was taken out.

    Raises:
        CheckpointError: names the file that is missing or cannot be read.
    """
    apart = content.get(KEY)
    if apart is None:
        return content
    with interpreting(where, CheckpointError):
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


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of the file, in order; a piece holds until the next is asked for."""
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    yield safetensors_header(kinds, {'format': 'pt'})
    host: torch.Tensor | None = None
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for part in flat.split(_PIECE):
            if part.device.type != 'cpu':
                if host is None:
                    host = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
                part = host[: part.numel()].copy_(part)
            if part.numel():
                yield memoryview(part.numpy())
