"""What a test sets up outside its own process, and takes down again on every path."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import pytest

T = TypeVar('T', bound='Bed')


class Bed:
    """A context manager: `up` when entered, `down` when left, also where `up` fails half-way."""

    def __enter__(self: T) -> T:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    def up(self) -> None:
        """Sets everything up."""
        raise NotImplementedError

    def down(self) -> None:
        """Takes down what is there."""
        raise NotImplementedError


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """Mounts a tmpfs of a size such as '2m' at a new directory; skips the test without root."""
    if os.geteuid() != 0:
        pytest.skip('mounting a small file system needs root')
    path.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(['umount', '-l', str(path)], check=True)


def missing(tools: tuple[str, ...], path: str | None = None) -> str | None:
    """Which of these programs are not there, for a test's reason to be skipped; None if all are."""
    absent = [tool for tool in tools if not shutil.which(tool, path=path)]
    return f'no {", ".join(absent)}' if absent else None
