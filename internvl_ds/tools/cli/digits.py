"""Write scikit-learn's handwritten digits as an image folder, to train on without a download."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_ds.errors import InternvlDsError
from internvl_ds.tools.text import say

if TYPE_CHECKING:
    from PIL.Image import Image

TOTAL = 1797  # images in scikit-learn's data set
CLASSES = tuple(str(digit) for digit in range(10))
SIDE = 32  # pixels; the originals are 8x8
_VAL_EVERY = 5  # of the images of a class, every fifth is for validation
_DARKEST = 16  # scikit-learn's pixels are 0..16


@dataclass(frozen=True)
class DigitsSummary:
    """The content of a digits folder."""

    root: Path  # the folder, with ``train/<class>/NNNN.png`` and ``val/<class>/NNNN.png`` below it
    train: int  # number of training images
    val: int  # number of validation images
    written: bool  # whether this call wrote them; False when they were there already


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the one argument, the folder."""
    text = 'folder to make, with train/ and val/ inside'
    parser.add_argument('dir', type=Path, metavar='DIR', help=text)


def run(args: argparse.Namespace) -> int:
    """Writes the data set and says what is there."""
    summary = write_digits(args.dir)
    images = f'{summary.train} training and {summary.val} validation images'
    if summary.written:
        say(f'wrote {images} in {summary.root}')
    else:
        say(f'{summary.root} holds the digits already, left as they are: {images}')
    return 0


def write_digits(root: Path) -> DigitsSummary:
    """Writes ``root/{train,val}/<class>/NNNN.png``, NNNN being the index in scikit-learn's data.

    The images are RGB, 32x32, enlarged from 8x8. Of each class every fifth image, from its first
    one on, is for validation: 20 %, stratified, the same at every call. The data set is
    written aside and renamed, so a half-written one is never seen under ``root``.

    Args:
        root: a folder that does not exist, is empty, or holds this data set already.

    Raises:
        InternvlDsError: when ``root`` is something else or cannot be written, or when scikit-learn
            is not installed.
    """
    root = Path(root)
    if (summary := _find_digits(root)) is not None:
        return summary
    try:
        _refuse_anything_else(root)
        data = _load_sklearn_digits()
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as aside:
            staged = Path(aside) / 'data'
            train, val = _write_images(staged, data.images, data.target)
            staged.rename(root)
    except OSError as error:
        if (summary := _find_digits(root)) is not None:  # another process was quicker
            return summary
        raise InternvlDsError(f'{root}: the digits cannot be written there: {error}') from error
    return DigitsSummary(root, train, val, written=True)


def enlarge(pixels: Any) -> Image:
    """Turns an 8x8 array of 0..16 into a 32x32 RGB image of 0..255."""
    import numpy as np
    from PIL import Image

    bright = np.rint(np.asarray(pixels) * (255 / _DARKEST)).astype(np.uint8)
    image = Image.fromarray(bright).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return image.convert('RGB')


def _load_sklearn_digits() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InternvlDsError(
            f'the digits come with scikit-learn, which cannot be imported ({error}); '
            "install it with: pip install 'internvl_ds[demo]'"
        ) from error
    return load_digits()


def _write_images(root: Path, images: Any, targets: Any) -> tuple[int, int]:
    for split in ('train', 'val'):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
    of_class: Counter[int] = Counter()
    of_split: Counter[str] = Counter()
    for index, (pixels, target) in enumerate(zip(images, targets, strict=True)):
        split = 'val' if of_class[target] % _VAL_EVERY == 0 else 'train'
        of_class[target] += 1
        of_split[split] += 1
        enlarge(pixels).save(root / split / str(target) / f'{index:04d}.png')
    return of_split['train'], of_split['val']


def _find_digits(root: Path) -> DigitsSummary | None:
    """The complete data set under ``root``, or None."""
    counts = {}
    for split in ('train', 'val'):
        if not all(os.path.isdir(root / split / name) for name in CLASSES):
            return None
        counts[split] = sum(1 for _ in (root / split).glob('[0-9]/[0-9][0-9][0-9][0-9].png'))
    if sum(counts.values()) != TOTAL:
        return None
    return DigitsSummary(root, counts['train'], counts['val'], written=False)


def _refuse_anything_else(root: Path) -> None:
    if not root.exists():
        return
    if not root.is_dir():
        raise InternvlDsError(f'{root}: is a file; name a folder that does not exist yet')
    if (first := next(root.iterdir(), None)) is not None:
        raise InternvlDsError(
            f'{root}: exists and is not a complete digits data set (it holds {first.name}); '
            'remove it or name another folder'
        )
