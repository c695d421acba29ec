"""Numbers, sizes and rates on the command line: 80GB is decimal, 80GiB binary."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

_DIGITS = 9  # of a whole number; sizes of tensors are computed with it
_POWERS = {'': 0, 'k': 1, 'm': 2, 'g': 3, 't': 4, 'p': 5}
_SIZE = re.compile(r'([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kmgtp]?)(i?)b', re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of '80GB' (80 x 1000 ** 3), '79.1 GiB' (x 1024 ** 3), '512B'. For argparse.

    Raises:
        ArgumentTypeError: for anything else, and for nothing.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no size: write 80GB (decimal) or 80GiB (binary)'
        )
    if len(match[1]) > _DIGITS:
        raise argparse.ArgumentTypeError(f'{text[:20]!r} has more than {_DIGITS} digits')
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].lower()])
    if size <= 0:
        raise argparse.ArgumentTypeError(f'{text!r} is nothing')
    return size


def parse_rate(text: str) -> int:
    """Bytes a second of '2GB/s'. For argparse.

    Raises:
        ArgumentTypeError: for anything else.
    """
    size, slash, second = text.strip().partition('/')
    if not slash or second.strip() != 's':
        raise argparse.ArgumentTypeError(f'{text!r} is no rate: write 2GB/s')
    return parse_size(size)


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``least`` on, 0 or 1, of up to 9 digits. For argparse."""
    due = 'not a number above 0; it has to be at least 1' if least else 'no number'

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text[: _DIGITS + 1]) < least:
            raise argparse.ArgumentTypeError(f'{text!r} is {due}')
        if len(text) > _DIGITS:
            raise argparse.ArgumentTypeError(f'{text[:20]!r} has more than {_DIGITS} digits')
        return int(text)

    return parse


def positive(text: str) -> float:
    """A finite number above 0. For argparse.

    Raises:
        ArgumentTypeError: for anything else.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f'{text[:20]!r} is not a number above 0')
    return number
