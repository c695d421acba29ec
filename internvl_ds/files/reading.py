"""Opens and parses files from outside within limits; anything else is an error at once.

A name may be a FIFO, a device or a link to one; a file may be sparse, endless or made to grow when
it is parsed. Everything that this package reads comes through here, or through
`internvl_ds.checkpoint.formats.tensor_files`. All of it raises OSError or ValueError (`Unreadable`,
without the path), which the caller turns into its own family of errors.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from internvl_ds.errors import InternvlDsError

# The longest file of each kind, bytes. The largest in use are a manifest of 60,000 files, and the
# position of a loop that keeps the order of a million images.
NAME_BYTES, YAML_BYTES, JSON_BYTES, LOG_BYTES = 4096, 1 << 18, 32 << 20, 16 << 20
# How deep containers may be nested, and how many values they may have once references are followed.
DEPTH, VALUES, YAML_VALUES = 64, 5_000_000, 20_000
# What a parsed JSON may take, bytes: an empty list takes 64, for two characters.
_PARSED_BYTES, _CONTAINER_BYTES, _VALUE_BYTES = 64 << 20, 64, 40
# Integers are used as floats too.
INT_BITS = 256


class Unreadable(ValueError):
    """A file is of a kind, size or depth that is not read; the message does not name it."""


def open_data(path: str | Path, *, ours: bool = False) -> BinaryIO:
    """Opens a regular file for reading; never blocks, as on a pipe.

    Args:
        path: the file. Links are followed: users link weights and directories.
        ours: of a file that this package writes under its own name and that nothing vouches for
            (no size, no checksum): a link in its place is refused.

    Raises:
        Unreadable: for what is no regular file.
        OSError: as `os.open`.
    """
    path = os.fspath(path)
    if '\0' in path:
        raise Unreadable('a name cannot hold a NUL')
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags | (os.O_NOFOLLOW if ours else 0))
    except OSError as error:
        if ours and error.errno == errno.ELOOP:
            raise Unreadable('is a symbolic link, and only regular files are read') from error
        raise
    try:
        _require_regular(os.fstat(descriptor))
        return io.BufferedReader(io.FileIO(descriptor))
    except BaseException:
        os.close(descriptor)
        raise


def _require_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        kind = 'a FIFO' if stat.S_ISFIFO(status.st_mode) else 'a device'
        raise Unreadable(f'is {kind}, and only regular files are read')


def read_bytes(path: str | Path, limit: int, *, ours: bool = False) -> bytes:
    """A whole file of at most ``limit`` bytes; see `open_data`.

    Raises:
        Unreadable, OSError: as `open_data`; for a longer file before it is read.
    """
    with open_data(path, ours=ours) as file:
        size = os.fstat(file.fileno()).st_size
        # A buffer of the limit would be given to the process, and taken again, for each file.
        data = b'' if size > limit else file.read(size + 1) or b''
        if size <= limit and len(data) > size:
            # /proc says 0 of all of its files, and some have nothing yet; another file has grown.
            data += file.read(limit + 1 - len(data)) or b''
    if max(size, len(data)) > limit:
        raise Unreadable(f'has {max(size, len(data))} bytes, and such a file has {limit} at most')
    return data


def read_text(path: str | Path, limit: int, *, ours: bool = False) -> str:
    """As `read_bytes`, as UTF-8 text."""
    return read_bytes(path, limit, ours=ours).decode('utf-8')


def read_json(path: str | Path, limit: int = JSON_BYTES, *, ours: bool = False) -> Any:
    """As `read_text`, and `parse_json` of it."""
    return parse_json(read_text(path, limit, ours=ours))


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parses JSON; ``pairs`` makes an object of its pairs, by default a dict.

    Raises:
        Unreadable: where it would take much memory, is nested deeply, or has a huge integer.
        ValueError: where it is no JSON.
    """
    takes = _CONTAINER_BYTES * (text.count('[') + text.count('{')) + _VALUE_BYTES * text.count(',')
    if takes > _PARSED_BYTES:
        raise Unreadable(f'would take {takes >> 20} MiB when it is parsed')
    try:
        tree = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise Unreadable(f'is nested deeper than {DEPTH} levels') from None
    require_bounded(tree)
    return tree


def require_bounded(tree: Any, values: int = VALUES) -> list[Any]:
    """Refuses nested containers that are too deep, or too many once references are followed.

    Returns:
        What is in them and is neither a container nor a number or text; each once in each.

    Raises:
        Unreadable: for these, for one inside itself, and for an integer that no float can hold.
    """
    others: list[Any] = []
    sizes: dict[int, int | None] = {}  # of a container, all that is in it; None: not yet known

    def size_of(container: Any, depth: int) -> int:
        if (size := sizes.get(id(container), 0)) != 0:
            if size is None:
                raise Unreadable('holds a container inside itself')
            return size
        if depth > DEPTH:
            raise Unreadable(f'is nested deeper than {DEPTH} levels')
        sizes[id(container)], size = None, 1 + len(container)
        for value in container.values() if isinstance(container, Mapping) else container:
            if isinstance(value, int):
                if value.bit_length() > INT_BITS:
                    raise Unreadable(f'holds an integer of {value.bit_length()} bits')
            elif isinstance(value, Mapping | list | tuple | set):
                size += size_of(value, depth + 1)
            elif value is not None and not isinstance(value, str | float):
                others.append(value)
        if size > values:
            raise Unreadable(f'holds more than {values} values, references followed')
        sizes[id(container)] = size
        return size

    size_of([tree], 0)
    return others


class interpreting:
    """Runs a block that interprets a file's content, and has no side effects.

    A file that was read well may still hold anything, and the first to meet an odd value raises
    whatever it raises: here it becomes one ``error_type`` that names the file or tag, ``where``.
    """

    # No generator: contextlib lets a StopIteration through, with whatever was raised in its place.
    def __init__(self, where: object, error_type: type[InternvlDsError]) -> None:
        self._where, self._error_type = where, error_type

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, InternvlDsError | OSError):
            reason = f'{type(error).__name__}: {error}'[:300]
            raise self._error_type(
                f'{self._where}: does not hold what belongs there ({reason})'
            ) from error
