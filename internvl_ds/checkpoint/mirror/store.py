"""The files of a mirror, through fsspec. Knows no tags and no ranks.

Whatever fails raises what the file system's client raises, of any type. Nothing is cached: another
rank may have written since.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

import fsspec

# A file is read and written in pieces of so many bytes.
PIECE = 1 << 20
PART = '.part'
# What a client sends and asks for at a time, and the most parts of a file: S3 takes 10,000.
_BLOCK, _PARTS = 8 << 20, 9000


class Source(Protocol):
    """What is uploaded."""

    def read(self, size: int, /) -> bytes: ...


class Store:
    """The directory that an address names.

    Attributes:
        address: without a slash at its end.
        loop: the client's own event loop, which a thread of fsspec runs; None where it has none.
    """

    def __init__(self, address: str) -> None:
        scheme = address.partition('://')[0]
        options = {'auto_mkdir': True} if scheme == 'file' else {'use_listings_cache': False}
        self.address = address
        self._is_local = scheme == 'file'
        self._files: Any = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
        self._root = self._files._strip_protocol(address).rstrip('/')
        self.loop = getattr(self._files, 'loop', None)

    def names(self, folder: str = '') -> list[str]:
        """The names in a folder, files and folders; none where it is not there."""
        self._files.invalidate_cache()
        try:
            entries = self._files.ls(self._place(folder), detail=False)
        except FileNotFoundError:
            return []
        return [entry.rstrip('/').rpartition('/')[2] for entry in entries]

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return bool(self._files.exists(self._place(name)))

    def read(self, name: str, limit: int) -> bytes:
        """The first ``limit`` bytes of a file."""
        return bytes(self._files.cat_file(self._place(name), start=0, end=limit))

    def put(self, name: str, source: Source, size: int) -> None:
        """Writes a file of ``size`` bytes, which is there as a whole or not at all.

        What fails, or is killed, leaves a file with PART behind its name in a directory, and parts
        in an object store that its own rules remove.
        """
        place, block = self._place(name), max(_BLOCK, -(-size // _PARTS // PIECE) * PIECE)
        aside = place + PART if self._is_local else place
        file = self._files.open(aside, 'wb', block_size=block)
        try:
            while piece := source.read(PIECE):
                file.write(piece)
            if self._is_local:
                file.flush()
                os.fsync(file.fileno())
            file.close()
            if self._is_local:
                self._files.mv(aside, place)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is raised, not this one
                file.discard()
            if not self._is_local:
                file.closed = True  # or it would write its part when it is collected
            raise

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """Opens a file for reading from front to back; yields it and its size in bytes."""
        with self._files.open(self._place(name), 'rb', block_size=_BLOCK) as file:
            yield file, int(file.size)

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm(self._place(name), recursive=True)

    def _place(self, name: str) -> str:
        return f'{self._root}/{name}'.rstrip('/')
