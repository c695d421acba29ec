"""Looks at image files, in processes of their own: whether each is read in training, and how."""

from __future__ import annotations

import io
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import NamedTuple, TypeVar

import xxhash
from PIL import Image

from internvl_ds.errors import DataError, shown
from internvl_ds.files.reading import read_bytes
from internvl_ds.train.datasets.decode import IMAGE_BYTES, decode

_CHUNK = 16  # images that a process takes at a time
_AHEAD = 4  # chunks for each process that wait for it, or to be taken from it

# Modes of Pillow that are read as others, and what people call them.
_MODES = {
    '1': 'two colours', 'L': 'grey', 'P': 'palette', 'PA': 'palette', 'I': '32-bit', 'F': '32-bit',
    'LA': 'transparency', 'La': 'transparency', 'RGBA': 'transparency', 'RGBa': 'transparency',
    'RGBX': 'transparency', 'LAB': 'Lab',
}  # fmt: skip

T = TypeVar('T')


class Looked(NamedTuple):
    """What one file is.

    Attributes:
        error: why it cannot be used, as training would say it; '' where it can.
        width, height: pixels, turned as EXIF says.
        size: bytes.
        digest: of its bytes; b'' where they cannot be read.
        kinds: what it is beside an RGB image of 8 bits and one frame.
        warning: Pillow's first, if any.
    """

    error: str = ''
    width: int = 0
    height: int = 0
    size: int = 0
    digest: bytes = b''
    kinds: tuple[str, ...] = ()
    warning: str = ''


def look(path: str) -> Looked:
    """Reads and decodes a file as training does."""
    looked = Looked()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            data = read_bytes(path, IMAGE_BYTES)
            looked = Looked(size=len(data), digest=xxhash.xxh3_128_digest(data))
            width, height = decode(data, upright=True).size
            looked = looked._replace(width=width, height=height, kinds=_kinds(data))
        except Exception as error:  # whatever Pillow raises
            looked = looked._replace(error=shown(f'{type(error).__name__}: {error}'))
    warning = shown(caught[0].message) if caught else ''
    return looked._replace(warning=warning)


def look_at(paths: Sequence[str], processes: int, done: Callable[[int], object]) -> list[Looked]:
    """`look` of each path, in order; ``done`` is told how many more are done, now and then.

    Raises:
        DataError: when a process ends on its own, as one that has no memory left.
    """
    return list(in_processes(look, paths, processes, done))


def in_processes(
    act: Callable[[str], T], paths: Sequence[str], processes: int, done: Callable[[int], object]
) -> Iterator[T]:
    """``act`` of each path, in order; only a few are kept in the making at any time."""
    count = max(1, min(processes, -(-len(paths) // _CHUNK)))
    waiting: deque[Future[list[T]]] = deque()
    # Not forked: a child of a process with threads may stand still.
    pool = ProcessPoolExecutor(count, get_context('spawn'), _begin)
    try:
        for start in range(0, len(paths), _CHUNK):
            waiting.append(pool.submit(_each, act, paths[start : start + _CHUNK]))
            if len(waiting) > _AHEAD * count:
                yield from _results(waiting, done)
        while waiting:
            yield from _results(waiting, done)
    except BrokenProcessPool as error:
        raise DataError(
            'a process that decodes images has ended on its own: it was killed, or there was no '
            'memory; with fewer --processes less is needed'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _results(waiting: deque[Future[list[T]]], done: Callable[[int], object]) -> list[T]:
    results = waiting.popleft().result()
    done(len(results))
    return results


def _each(act: Callable[[str], T], paths: Sequence[str]) -> list[T]:
    return [act(path) for path in paths]


def _begin() -> None:
    # Ctrl-C reaches every process of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _kinds(data: bytes) -> tuple[str, ...]:
    kinds = []
    with Image.open(io.BytesIO(data)) as image:  # the header alone
        scaled = image.mode == 'I' and image.format in ('PNG', 'PPM')  # by Pillow, to 16 bits
        if scaled or image.mode.startswith('I;16') or any(';16' in str(t[3]) for t in image.tile):
            kinds.append('16-bit')
        elif image.mode != 'RGB':
            kinds.append(_MODES.get(image.mode, image.mode))
        if getattr(image, 'n_frames', 1) > 1:
            animated = image.format in ('GIF', 'PNG', 'WEBP')
            kinds.append('animated' if animated else 'several frames')
    return tuple(kinds)
