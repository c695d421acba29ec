"""Images inside a zip file, read at their places: forked workers share the descriptor safely."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from internvl_ds.errors import ConfigError
from internvl_ds.files.reading import Unreadable, open_data
from internvl_ds.train.datasets.decode import IMAGE_BYTES
from internvl_ds.train.datasets.sources import encoded

_LOCAL_HEADER = struct.Struct('<4s22xHH')  # of an entry: signature, length of name and extra field
_ENCRYPTED = 1  # bit of an entry's flags


class Archive:
    """Entries of a zip file, stored or deflated.

    The table of contents is read once, before workers are forked. An entry is read with `os.pread`,
    which has no position that processes could take from each other; a process that did not inherit
    the file opens it for itself.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its table of contents.

        Raises:
            ConfigError: when it is no zip file.
        """
        self.path = path
        try:
            self._open()
            with zipfile.ZipFile(self._file) as archive:
                self._entries = {entry.filename: entry for entry in archive.infolist()}
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            raise ConfigError(f'{path}: cannot be read as a zip file: {error}') from error
        self.root, self.names = str(path), encoded([])

    def files(self, folder: str) -> Iterator[str]:
        """Paths of the entries below a folder of the archive ('' for all), without it."""
        start = f'{folder}/' if folder else ''
        for name in self._entries:
            if name.startswith(start) and not name.endswith('/'):
                yield name[len(start) :]

    def choose(self, folder: str, names: Sequence[str]) -> Archive:
        """Selects these entries as the images 0, 1, ...; returns itself.

        Raises:
            ConfigError: names an entry that is not there, or is of a kind or size not read.
        """
        rows = []
        for name in names:
            inside = f'{folder}/{name}' if folder else name
            entry = self._entries.get(inside)
            if entry is None:
                raise ConfigError(f'{self.path}: has no entry {inside}')
            if entry.flag_bits & _ENCRYPTED or entry.compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):
                raise ConfigError(
                    f'{self.path}: {inside} is encrypted, or neither stored nor deflated; zip it '
                    'again, with `zip -0`'
                )
            if max(entry.file_size, entry.compress_size) > IMAGE_BYTES:
                raise ConfigError(
                    f'{self.path}: {inside} has {entry.file_size} bytes, and an image has '
                    f'{IMAGE_BYTES} at most'
                )
            sizes = entry.compress_size, entry.file_size
            rows.append((entry.header_offset, *sizes, entry.compress_type, entry.CRC))
        self.root, self.names = f'{self.path}@/{folder}'.rstrip('/'), encoded(names)
        self._rows = np.array(rows, dtype=np.int64).reshape(-1, 5)
        self._entries = {}
        return self

    def where(self, index: int) -> str:
        """Archive and entry of an image."""
        return f'{self.root}/{os.fsdecode(self.names[index])}'

    def size(self, index: int) -> int:
        """Bytes of an entry, unpacked."""
        return int(self._rows[index, 2])

    def read(self, index: int) -> bytes:
        """An entry, unpacked; no more than the table of contents says is unpacked.

        Raises:
            Unreadable: when it is not what the table of contents says.
            OSError: as `os.pread`.
        """
        offset, packed, size, method, crc = map(int, self._rows[index])
        if self._pid != os.getpid():
            self._open()
        descriptor = self._file.fileno()
        header = os.pread(descriptor, _LOCAL_HEADER.size, offset)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b'PK\3\4'):
            raise Unreadable('is not where the table of contents of the archive says')
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        data = os.pread(descriptor, packed, offset + len(header) + name_length + extra_length)
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise Unreadable(str(error)) from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise Unreadable('does not have the size and checksum that the archive says')
        return data

    def _open(self) -> None:
        self._file: BinaryIO = open_data(self.path)
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        """For workers that are not forked: they open the file for themselves."""
        return {**vars(self), '_file': None, '_pid': None}
