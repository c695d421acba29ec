"""Text for a terminal or a pipe: tables, sizes, ages, JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from internvl_ds.errors import InternvlDsError, printable, shown

_SIZE_UNITS = ('kB', 'MB', 'GB', 'TB', 'PB')
_AGE_UNITS = ((86400, 'd'), (3600, 'h'), (60, 'min'))

_answers: TextIO | None = None


@contextlib.contextmanager
def stdout_for_answers() -> Iterator[None]:
    """Sends what `say` prints to stdout, and all else to stderr: DeepSpeed logs to stdout."""
    global _answers
    _answers = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _answers = None


def say(text: str) -> None:
    """Prints a line at once, `printable`.

    A reader that is gone (``| head``) is no error: the program keeps its exit status.

    Raises:
        InternvlDsError: where the line cannot be written, as on a full disk.
    """
    stream = _answers or sys.stdout
    text = printable(text)
    if stream.encoding:  # a terminal may lack letters
        text = text.encode(stream.encoding, 'backslashreplace').decode(stream.encoding)
    try:
        print(text, flush=True, file=stream)
    except OSError as error:
        # The rest of the buffer is flushed at exit: it goes nowhere too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            raise InternvlDsError(f'the answer cannot be written: {error.strerror}') from error


def json_text(tree: Any) -> str:
    """``tree`` as JSON for people and programs alike."""
    return json.dumps(tree, indent=2)


def human_size(size: float) -> str:
    """Bytes with a decimal unit, as disks are sold: ``999 B``, ``1.4 GB``."""
    if size < 1000:
        return f'{size:.0f} B'
    for unit in _SIZE_UNITS:
        size /= 1000
        if size < 999.95 or unit == _SIZE_UNITS[-1]:
            break
    return f'{size:.1f} {unit}'


def human_age(seconds: float) -> str:
    """A time that has passed, in its largest unit: ``45 s``, ``3 min``, ``20 h``, ``12 d``.

    What another host's clock puts into the future is 0 s old.
    """
    for length, unit in _AGE_UNITS:
        if seconds >= length:
            return f'{seconds // length:.0f} {unit}'
    return f'{max(0.0, seconds):.0f} s'


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Aligned columns, two spaces apart, without spaces at the ends of lines.

    Args:
        titles: of the columns.
        rows: of as many cells each.
        right: the titles of the columns that are aligned to the right.
    """
    lines = [titles, *(list(map(shown, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [
            cell.rjust(width) if title in right else cell.ljust(width)
            for cell, width, title in zip(line, widths, titles, strict=True)
        ]
        text.append('  '.join(cells).rstrip())
    return '\n'.join(text)
