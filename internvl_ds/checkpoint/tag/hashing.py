"""Files written, flushed and read with their size and xxh3-128 digest. Files only; knows no ranks.

xxh3-128 (the xxhash library) finds what disks, networks and hands do to a file. It is no defence
against someone who means harm: shards are therefore read as data only.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import xxhash

from internvl_ds.checkpoint.formats.allowed import PortablePickle
from internvl_ds.checkpoint.frozen.frozen_bytes import bytes_of
from internvl_ds.checkpoint.tag.manifest import FileEntry
from internvl_ds.checkpoint.tag.pace import wait_after
from internvl_ds.files import flush
from internvl_ds.files.reading import open_data

# Hashed and written piece by piece: a piece is still in the CPU's cache when it is copied.
_PIECE = 1 << 20
# The kernel begins to write after so many bytes, so that the flush finds little left.
_WRITE_BACK = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2
# Hashed from a mapping part by part, whole pages each.
_PART = 64 << 20
_MADV_POPULATE_READ = 22

# torch's CRC switch is global: one save at a time may turn it.
_crc_switch = threading.Lock()


def write_hashed(path: Path, write: Callable[[IO[bytes]], object]) -> FileEntry:
    """Writes a file from front to back and flushes it to disk, hashing on the way.

    An OSError says the path and how many bytes were already there.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
    raw = _HashingFile(path, os.open(path, flags, 0o666))
    try:
        with io.BufferedWriter(raw, _PIECE) as file:
            write(file)
            file.flush()
            raw.sync()
    finally:
        raw.close()
    return FileEntry(raw.size, raw.hash.hexdigest())


def write_tensors(value: Any, file: IO[bytes]) -> None:
    """`torch.save` without the zip's CRC, which costs more than all the rest.

    ``torch.load`` does not look at the CRC; the ``unzip`` command complains of it.
    """
    with _without_crc():
        torch.save(value, file, pickle_module=PortablePickle)


def write_safetensors(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None, file: IO[bytes]
) -> None:
    """The bytes of a .safetensors file; the tensors of the widest numbers first, so all lie even.

    Raises:
        KeyError: for a dtype that the format has no name for.
    """
    ordered = sorted(tensors.items(), key=lambda pair: -pair[1].itemsize)
    for piece in bytes_of(dict(ordered), metadata or {}):
        file.write(piece)


def flush_and_hash(path: Path) -> FileEntry:
    """Flushes to disk what something else wrote, and hashes it."""
    flush(path)
    return hash_file(path)


def hash_file(path: Path, expected: int | None = None) -> FileEntry:
    """The size and digest of a file; digest '' if its size is not ``expected``.

    Raises:
        OSError: when it cannot be read; a sector that cannot be is no end of the process.
        ValueError: when it is no regular file.
    """
    digest = xxhash.xxh3_128()
    with open_data(path) as file:
        size = os.fstat(file.fileno()).st_size
        if expected not in (None, size):
            return FileEntry(size, '')
        # Twice as fast as reading, in the page cache.
        if not size or not _hash_mapped(file.fileno(), size, digest):
            size = _hash_read(file, digest)
    return FileEntry(size, digest.hexdigest())


def _hash_mapped(descriptor: int, size: int, digest: Any) -> bool:
    """Hashes a mapped file; returns False, and hashes nothing, if it cannot be mapped.

    Each part is asked for before it is touched: what cannot be read is then an error (EFAULT) of
    the asking, where the touch would end the process (SIGBUS). Linux 5.14 and newer.
    """
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
        for start in range(0, size, _PART):
            length = min(_PART, size - start)
            try:
                mapped.madvise(_MADV_POPULATE_READ, start, length)
            except OSError as error:
                if start == 0 and error.errno == errno.EINVAL:
                    return False
                raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
            with view[start : start + length] as part:
                digest.update(part)
    return True


def _hash_read(file: IO[bytes], digest: Any) -> int:
    buffer, size = memoryview(bytearray(_PIECE)), 0
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
        size += count
    return size


@contextmanager
def _without_crc() -> Iterator[None]:
    with _crc_switch:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(before)


class _HashingFile(io.RawIOBase):
    """An unbuffered file that hashes its bytes while the disk writes them.

    A failed write is raised by `sync`, not by `write`: torch.save writes from C++, which turns an
    exception from here into another one that does not say why.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        super().__init__()
        self.path, self.size, self.hash = path, 0, xxhash.xxh3_128()
        self._error: OSError | None = None
        self._started = 0
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast('B')
        try:
            for start in range(0, len(view), _PIECE):
                if self._error is None:
                    self._write_piece(view[start : start + _PIECE])
        except OSError as error:
            self._error = error
        return len(view)

    def _write_piece(self, piece: memoryview) -> None:
        self.hash.update(piece)
        length = len(piece)
        while len(piece):
            count = os.write(self._descriptor, piece)
            piece = piece[count:]
            self.size += count
        if self.size - self._started >= _WRITE_BACK:
            _start_write_back(self._descriptor, self._started, self.size - self._started)
            self._started = self.size
        wait_after(length)

    def sync(self) -> None:
        """Flushes to disk; raises any write error since the file was opened."""
        try:
            if self._error is None:
                os.fsync(self._descriptor)
        except OSError as error:
            self._error = error
        if self._error is not None:
            text = f'{self._error.strerror} after {self.size} bytes'
            raise OSError(self._error.errno, text, str(self.path)) from self._error

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


_sync_file_range = getattr(ctypes.CDLL(None), 'sync_file_range', None)


def _start_write_back(descriptor: int, start: int, count: int) -> None:
    """Asks Linux to begin writing a range to disk: a hint, fsync reports what fails."""
    if _sync_file_range is not None:
        long = ctypes.c_int64
        _sync_file_range(descriptor, long(start), long(count), _SYNC_FILE_RANGE_WRITE)
