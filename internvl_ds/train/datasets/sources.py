"""Encoded images by number: from files of a folder, or kept in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from internvl_ds.errors import shown
from internvl_ds.files.reading import Unreadable, open_data, read_bytes
from internvl_ds.train.datasets.decode import IMAGE_BYTES
from internvl_ds.train.datasets.skipping import is_of_file

# Values of DATA.DATASET whose images have their labels with them; hfds may be followed by a name.
SOURCES = ('tar', 'wds', 'csv', 'jsonl', 'hfds')

# A label from here on is a mistake in the data: a model of so many classes would take all memory.
MOST_CLASSES = 1 << 24


class Source(Protocol):
    """Where the images of a split come from.

    Attributes:
        root: the folder or archive, for messages.
        names: paths below it, encoded by `os.fsencode`, as one numpy array of bytes: a worker that
            is forked does not copy them by reading them.
    """

    root: str
    names: np.ndarray

    def size(self, index: int) -> int:
        """Bytes of an encoded image."""

    def read(self, index: int) -> bytes:
        """An encoded image; raises OSError or ValueError."""

    def where(self, index: int) -> str:
        """An image's file, for messages."""


@dataclass(frozen=True)
class Opened:
    """The images of a split, before they are transformed.

    Attributes:
        source: the encoded images.
        labels: one an image: a number; of several labels a list of numbers.
        classes: names by label; none where they are not known.
        count: how many classes the labels tell apart, as far as the data say.
    """

    source: Source
    labels: Sequence[Any]
    classes: Sequence[str]
    count: int


def encoded(names: Sequence[str]) -> np.ndarray:
    """Names as `Source` keeps them."""
    return np.array([os.fsencode(name) for name in names], dtype='S')


class Folder:
    """Files below a folder."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names = str(root), encoded(names)

    def path(self, index: int) -> str:
        """Path of an image."""
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def where(self, index: int) -> str:
        """Path of an image, for messages."""
        return self.path(index)

    def size(self, index: int) -> int:
        """Bytes of a file."""
        with open_data(self.path(index)) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, index: int) -> bytes:
        """The bytes of a file."""
        return read_bytes(self.path(index), IMAGE_BYTES)


class Memory:
    """Keeps the encoded images of some numbers in one buffer, which forked workers share."""

    def __init__(
        self, source: Source, indices: range, sizes: Sequence[int], *, skips: bool = False
    ) -> None:
        """Reads them.

        Args:
            source: what to read from, and what the images outside of ``indices`` are read from.
            indices: numbers of the images to keep.
            sizes: from `sizes_of`.
            skips: leave out faulty ones, whose errors come from the source when they are asked for.

        Raises:
            Unreadable: names the image that cannot be read, or has changed meanwhile.
        """
        self.root, self.names = source.root, source.names
        self._source, self._indices = source, indices
        self._left_out: set[int] = set()
        self._ends = np.cumsum([0, *sizes], dtype=np.int64)
        self._bytes = np.empty(int(self._ends[-1]), dtype=np.uint8)
        for place, index in enumerate(indices):
            try:
                data = source.read(index)
                if len(data) != sizes[place]:
                    raise Unreadable('it changed while it was read')
            except (OSError, ValueError) as error:
                _require_skip(source, index, error, skips)
                self._left_out.add(index)
            else:
                start, end = self._ends[place], self._ends[place + 1]
                self._bytes[start:end] = np.frombuffer(data, np.uint8)

    @property
    def kept_bytes(self) -> int:
        """Bytes of all images that are kept."""
        return len(self._bytes)

    def where(self, index: int) -> str:
        """As of the source."""
        return self._source.where(index)

    def size(self, index: int) -> int:
        """As of the source."""
        return self._source.size(index)

    def read(self, index: int) -> bytes:
        """The bytes of an image, from memory where it is kept."""
        if index not in self._indices or index in self._left_out:
            return self._source.read(index)
        place = self._indices.index(index)
        return self._bytes[self._ends[place] : self._ends[place + 1]].tobytes()


def sizes_of(source: Source, indices: range, *, skips: bool = False) -> list[int]:
    """Bytes of images; 0 where ``skips``, and the file is faulty.

    Raises:
        Unreadable: names an image that cannot be read.
    """
    sizes = []
    for index in indices:
        try:
            sizes.append(source.size(index))
        except (OSError, ValueError) as error:
            _require_skip(source, index, error, skips)
            sizes.append(0)
    return sizes


def _require_skip(source: Source, index: int, error: Exception, skips: bool) -> None:
    if not (skips and is_of_file(error)):
        reason = getattr(error, 'strerror', None) or error  # without the path a second time
        raise Unreadable(f'{shown(source.where(index))}: {reason}') from error
