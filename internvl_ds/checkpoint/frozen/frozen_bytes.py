"""The bytes, and so the digest, of a .safetensors file that is not written yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
import xxhash

from internvl_ds.checkpoint.formats.tensor_files import safetensors_header
from internvl_ds.checkpoint.tag.manifest import FileEntry

_METADATA = {'format': 'pt'}
_PIECE = 64 << 20  # bytes that are copied from a GPU at a time


def entry_of(tensors: Mapping[str, torch.Tensor]) -> FileEntry:
    """The size and digest of the file that these tensors would make; writes nothing."""
    digest, size = xxhash.xxh3_128(), 0
    for piece in bytes_of(tensors):
        digest.update(piece)
        size += len(piece)
    return FileEntry(size, digest.hexdigest())


def bytes_of(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] = MappingProxyType(_METADATA)
) -> Iterator[bytes | memoryview]:
    """The bytes of the file, in order; a piece holds until the next is asked for."""
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    yield safetensors_header(kinds, metadata)
    host: torch.Tensor | None = None
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for part in flat.split(_PIECE):
            if part.device.type != 'cpu':
                if host is None:
                    host = torch.empty(
                        _PIECE, dtype=torch.uint8, pin_memory=torch.cuda.is_available()
                    )
                part = host[: part.numel()].copy_(part)
            if part.numel():
                yield memoryview(part.numpy())
