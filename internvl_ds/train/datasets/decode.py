"""Decodes an image file to 8-bit RGB; grey levels of more bits are scaled by their range."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from internvl_ds.files.reading import Unreadable

# The longest encoded image, bytes; the largest of ImageNet have 15 MB.
IMAGE_BYTES = 1 << 30

_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Of TIFF: bits of a sample; the least and the largest value that samples have.
_BITS, _LEAST, _LARGEST = 258, 340, 341
# Largest values that are taken for white where a file states them. Others are not: some programs
# write what the image at hand happens to hold.
_WHITES = (1, 255, 65535)


def decode(data: bytes, *, upright: bool) -> Image.Image:
    """Decodes an encoded image; of several frames the first.

    Args:
        data: the file.
        upright: whether to turn the image as its EXIF orientation says. A block of EXIF that cannot
            be read says nothing. Pillow itself turns TIFF files, either way.

    Returns:
        An image of mode RGB, loaded, as Pillow converts it; transparency is dropped.

    Raises:
        Unreadable: for an empty file, an unknown format, and grey levels of unknown range.
        Exception: whatever Pillow raises for a damaged file.
    """
    if not data:
        raise Unreadable('it is empty')
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise Unreadable('it has no image format that Pillow knows, or a damaged header') from None
    image.load()
    return as_rgb(image, upright=upright)


def as_rgb(image: Image.Image, *, upright: bool = False) -> Image.Image:
    """An opened image as `decode` gives it, and raising the same."""
    levels = image
    if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
        levels = _to_8_bits(image)
    turned = _turned(levels, image) if upright else levels
    # Pillow would copy an image that is RGB already, in a third of the time of its decoding.
    return turned if turned.mode == 'RGB' else turned.convert('RGB')


def _turned(image: Image.Image, opened: Image.Image) -> Image.Image:
    """``image``, turned as the EXIF block of ``opened`` says."""
    try:
        turn = _TURNS.get(opened.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's, of any kind, for a damaged block
        return image
    return image if turn is None else image.transpose(turn)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales grey levels so that the end of their range is 255; Pillow would clip them there."""
    white, levels = _white(image), np.asarray(image)
    if white is None:
        kind = 'floats' if image.mode == 'F' else '32-bit integers'
        raise Unreadable(
            f'its samples are {kind} whose range is not known: convert it to 8 or 16 bits'
        )
    if not (levels.min() >= 0 and levels.max() <= white):  # NaN too
        raise Unreadable(
            f'its samples are from {levels.min()} to {levels.max()}, and its range is 0 ... {white}'
        )
    return Image.fromarray(np.rint(levels * (255 / white)).astype(np.uint8))


def _white(image: Image.Image) -> int | None:
    """The largest value of the range of an image's grey levels; None where it is not known."""
    tags = getattr(image, 'tag_v2', {})
    if image.mode.startswith('I;16'):  # 12 bits, too, are kept in 16
        return (1 << tags.get(_BITS, (16,))[0]) - 1
    if image.mode == 'I' and image.format in ('PNG', 'PPM'):
        return 65535  # Pillow scales PGM files to this
    least, largest = (np.ravel(tags.get(tag, -1)).tolist() for tag in (_LEAST, _LARGEST))
    return int(largest[0]) if least == [0] and largest[0] in _WHITES else None
