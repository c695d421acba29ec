"""Faulty training images: which others come in their place, how many there are, and on what ranks.

A loader's workers are forked from their rank. What they find goes to their rank through an unlinked
file in memory, which takes any number of lines and waits for nobody; and so does what other ranks
have found to workers that are kept.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
from collections.abc import Iterator

import numpy as np

from internvl_ds.dist.rendezvous import exchange, rank
from internvl_ds.errors import DataError, few, shown

_log = logging.getLogger(__name__)

# System errors that are of the file, and the same in every run. Others (no descriptors, a network
# file system that does not answer) pass: to skip for them would make each run another one.
_OF_THE_FILE = {
    None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENXIO,
}  # fmt: skip
_REASON = 500  # characters of an error, the path included


def is_of_file(error: BaseException | None) -> bool:
    """Whether an error in reading or decoding an image is one of its file, and will come again."""
    if isinstance(error, OSError):
        return error.errno in _OF_THE_FILE
    return isinstance(error, Exception) and not isinstance(error, MemoryError)


class Skipped:
    """The training images that were replaced by others, over all ranks and since the run began.

    Attributes:
        found: an error for each number of an image, as far as this process knows.
    """

    def __init__(self, total: int, share: float) -> None:
        """Begins without any.

        Args:
            total: images in the data set.
            share: DATA.MAX_SKIPPED.
        """
        self.found: dict[int, str] = {}
        self._total, self._share = total, share
        # One image is left, whatever the share: else there would be none to replace others.
        self._most = min(math.floor(share * total + 1e-6), total - 1)
        self._told: set[int] = set()
        self._read_to = 0
        # Without a buffer, and appending: a line is one write, and those of processes do not mix.
        self._file = open(os.memfd_create('skipped'), 'r+b', buffering=0)  # noqa: PTH123, SIM115
        fcntl.fcntl(self._file, fcntl.F_SETFL, os.O_APPEND)

    def others(self, number: int) -> Iterator[int]:
        """Images to take in the place of one: the same in every epoch, run and world size."""
        generator = np.random.default_rng([self._total, number])
        while True:
            yield int(generator.integers(self._total))

    def add(self, number: int, error: str) -> None:
        """Notes a faulty image; in any process of a rank.

        Raises:
            DataError: when this rank alone has found more than the share.
        """
        error = shown(error)[:_REASON]
        self._write(number, error)
        self._read()
        self._require_few(error)

    def untold(self) -> int:
        """How many images this rank has found that `tell` has not told of yet."""
        self._read()
        return len(self.found.keys() - self._told)

    def tell(self, when: str, timeout: float) -> None:
        """Meets the ranks, and has rank 0 log what any of them has found since the last time.

        Collective: every rank calls it.

        Args:
            when: for the log.
            timeout: seconds to wait for the others.

        Raises:
            DataError: on all ranks, when together they have found more than the share.
        """
        self._read()
        mine = [[number, self.found[number]] for number in sorted(self.found.keys() - self._told)]
        for theirs in exchange('skipped images', mine, timeout):
            for number, error in theirs:
                self._write(number, error)
            self.found.update(dict(theirs))
        fresh = sorted(self.found.keys() - self._told)
        self._told.update(fresh)
        if rank() == 0 and fresh:
            _log.warning(
                '%s: %d images were found faulty, and others took their places '
                '(DATA.ON_ERROR skip):', when, len(fresh),
            )  # fmt: skip
            for number in fresh:
                _log.warning('skipped: %s', self.found[number])
        if fresh:
            self._require_few(self.found[fresh[-1]])

    def tell_all(self) -> None:
        """Has rank 0 log all that `tell` has told of."""
        if rank() == 0 and self._told:
            _log.warning(
                '%d of %d training images were skipped in this run (DATA.ON_ERROR skip):',
                len(self._told), self._total,
            )  # fmt: skip
            for number in sorted(self._told):
                _log.warning('skipped: %s', self.found[number])

    def _write(self, number: int, error: str) -> None:
        if number not in self.found:
            self._file.write(json.dumps([number, error]).encode() + b'\n')

    def _read(self) -> None:
        """Takes over the lines that other processes, or this one, have written since."""
        size = os.fstat(self._file.fileno()).st_size
        data = os.pread(self._file.fileno(), size - self._read_to, self._read_to)
        lines = data[: data.rfind(b'\n') + 1]  # another process may be in the middle of the last
        self._read_to += len(lines)
        for line in lines.splitlines():
            number, error = json.loads(line)
            self.found.setdefault(number, error)

    def _require_few(self, last: str) -> None:
        if len(self.found) <= self._most:
            return
        raise DataError(
            f'{len(self.found)} of {self._total} training images are faulty, and DATA.MAX_SKIPPED '
            f'{self._share:g} lets {self._most} be skipped: mend or remove them, or set it larger; '
            f'the last: {last}; the first: {few(list(self.found.values()), 3)}'
        )
