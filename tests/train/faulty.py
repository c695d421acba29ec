"""Pictures that are faulty or odd, each with what becomes of it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

# Grey levels from 0 to 1, row by row: a picture that is read rightly has this mean.
RAMP = np.linspace(0, 1, 256).reshape(16, 16)
MEAN = 0.5


class Picture(NamedTuple):
    """One file.

    Attributes:
        name: with its extension.
        content: makes the file's bytes.
        mean: of the image as it is read, from 0 to 1; None where it is refused.
        words: of the error, where it is refused.
    """

    name: str
    content: Callable[[], bytes]
    mean: float | None = MEAN
    words: str = ''


def encode(image: Image.Image, kind: str, **values: Any) -> bytes:
    """The bytes of a file of that kind."""
    file = io.BytesIO()
    image.save(file, kind, **values)
    return file.getvalue()


def grey(white: float, kind: str) -> Image.Image:
    """The ramp, from 0 to ``white``, as numbers of a numpy kind."""
    return Image.fromarray((RAMP * white).astype(kind))


def colour() -> Image.Image:
    """The ramp in three equal channels."""
    return grey(255, 'u1').convert('RGB')


def _of(mode: str, kind: str, **values: Any) -> bytes:
    return encode(colour().convert(mode), kind, **values)


def _cut(kind: str, share: float) -> bytes:
    whole = _of('RGB', kind)
    return whole[: int(len(whole) * share)]


def _flipped_bit() -> bytes:
    data = bytearray(_of('RGB', 'PNG'))
    data[len(data) // 2] ^= 255
    return bytes(data)


def _png(width: int, height: int, bits: int, channels: int, rows: bytes) -> bytes:
    """A PNG of given rows, each with its filter byte."""
    colours = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack('>IIBBBBB', width, height, bits, colours, 0, 0, 0)
    chunks = ((b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
        for name, data in chunks
    )


def _deep_png(channels: int) -> bytes:
    """The ramp with 16 bits in each of several channels; an alpha channel is full."""
    pixels = np.repeat((RAMP * 65535).astype('>u2')[..., None], channels, axis=2)
    if channels in (2, 4):
        pixels[..., -1] = 65535
    return _png(16, 16, 16, channels, b''.join(b'\0' + row.tobytes() for row in pixels))


def _bomb() -> bytes:
    """A PNG that says 20,000 x 20,000 pixels, and has none."""
    return _png(20_000, 20_000, 8, 3, b'')


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _of('RGB', 'PNG', exif=exif)


def _frames(kind: str) -> bytes:
    black = Image.new('RGB', (16, 16))
    return encode(colour(), kind, save_all=True, append_images=[black, black])


def _states(image: Image.Image, least: float, largest: float) -> bytes:
    """A TIFF file that states the least and the largest value of its samples."""
    return encode(image, 'TIFF', tiffinfo={340: least, 341: largest})


def _tiff_of_12_bits() -> bytes:
    """The ramp in packed samples of 12 bits, which Pillow reads and does not write."""
    levels = (RAMP * 4095).astype(int)
    rows = b''.join(
        int(''.join(f'{level:012b}' for level in row), 2).to_bytes(24, 'big') for row in levels
    )
    tags = {
        256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 200, 277: 1, 278: 16, 279: len(rows),
    }  # fmt: skip
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items())
    head = b'II*\0' + struct.pack('<IH', 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b'\0') + rows


def _strip(width: int, height: int) -> bytes:
    return encode(Image.new('L', (width, height), 128), 'PNG')


PICTURES = [
    # Damaged, or none.
    Picture('empty.png', lambda: b'', None, 'it is empty'),
    Picture('text.jpg', lambda: b'<html>404</html>', None, 'no image format'),
    Picture('zeros.png', lambda: bytes(4096), None, 'no image format'),
    Picture('header_alone.png', lambda: _of('RGB', 'PNG')[:20], None, 'Truncated'),
    Picture('cut_in_header.jpg', lambda: _of('RGB', 'JPEG')[:10], None, 'Truncated'),
    Picture('cut.jpg', lambda: _cut('JPEG', 0.95), None, 'truncated'),
    Picture('cut.png', lambda: _cut('PNG', 0.5), None, 'truncated'),
    Picture('cut.webp', lambda: _cut('WEBP', 0.5), None, 'decoder'),
    Picture('cut.tif', lambda: _cut('TIFF', 0.5), None, 'truncated'),
    Picture('cut.bmp', lambda: _cut('BMP', 0.5), None, 'truncated'),
    Picture('cut.pgm', lambda: b'P5 16 16 255\n' + bytes(100), None, 'truncated'),
    Picture('end_mark_lost.png', lambda: _of('RGB', 'PNG')[:-12]),
    Picture('flipped_bit.png', _flipped_bit, None, 'broken data stream'),
    Picture('bomb.png', _bomb, None, 'DecompressionBombError'),
    # Well, but odd.
    Picture('is_a_png.jpg', lambda: _of('RGB', 'PNG')),
    Picture('is_a_gif.png', lambda: _of('P', 'GIF')),
    Picture('two_colours.png', lambda: _of('1', 'PNG')),
    Picture('palette.png', lambda: _of('P', 'PNG')),
    Picture('clear.png', lambda: _of('RGBA', 'PNG')),
    Picture('grey_alpha.png', lambda: _of('LA', 'PNG')),
    Picture('cmyk.jpg', lambda: _of('CMYK', 'JPEG')),
    Picture('lab.tif', lambda: encode(Image.new('LAB', (16, 16), (128, 128, 128)), 'TIFF'), 0.47),
    Picture('animated.webp', lambda: _frames('WEBP')),
    Picture('animated.png', lambda: _frames('PNG')),
    Picture('one_pixel.png', lambda: _strip(1, 1), 0.5),
    Picture('wide.png', lambda: _strip(20_000, 10), 0.5),
    Picture('line.png', lambda: _strip(20_000, 1), 0.5),
    Picture('bad_profile.jpg', lambda: _of('RGB', 'JPEG', icc_profile=b'no profile')),
    Picture('bad_profile.png', lambda: _of('RGB', 'PNG', icc_profile=b'no profile')),
    Picture('bad_exif.jpg', lambda: _of('RGB', 'JPEG', exif=b'Exif\0\0no block')),
    Picture('bad_exif.png', lambda: _of('RGB', 'PNG', exif=b'Exif\0\0no block')),
    Picture('turned.png', lambda: _turned(6)),
    Picture('turned_99.png', lambda: _turned(99)),
    # Grey levels of more than 8 bits.
    Picture('16_bits.png', lambda: encode(grey(65535, 'u2'), 'PNG')),
    Picture('16_bits.tif', lambda: encode(grey(65535, 'u2'), 'TIFF')),
    Picture('16_bits_motorola.tif', lambda: encode(grey(65535, '>u2'), 'TIFF')),
    Picture('16_bits.pgm', lambda: b'P5 16 16 65535\n' + (RAMP * 65535).astype('>u2').tobytes()),
    Picture('12_bits.pgm', lambda: b'P5 16 16 4095\n' + (RAMP * 4095).astype('>u2').tobytes()),
    Picture('12_bits.tif', _tiff_of_12_bits),
    Picture('16_bits_alpha.png', lambda: _deep_png(2)),
    Picture('16_bits_colour.png', lambda: _deep_png(3)),
    Picture('32_bits.tif', lambda: encode(grey(65535, 'i4'), 'TIFF'), None, '32-bit integers'),
    Picture('32_bits_stated.tif', lambda: _states(grey(65535, 'i4'), 0, 65535)),
    Picture('32_bits_below.tif', lambda: _states(grey(-9, 'i4'), 0, 255), None, 'from -9 to 0'),
    Picture('float.tif', lambda: encode(grey(1, 'f4'), 'TIFF'), None, 'are floats'),
    Picture('float_to_255.tif', lambda: encode(grey(255, 'f4'), 'TIFF'), None, 'are floats'),
    Picture('float_stated.tif', lambda: _states(grey(1, 'f4'), 0.0, 1.0)),
    Picture('float_own_range.tif', lambda: _states(grey(9, 'f4'), 0.0, 9.0), None, 'are floats'),
    Picture('float_nan.tif', lambda: _states(grey(np.nan, 'f4'), 0.0, 1.0), None, 'nan'),
    Picture('float.pgm', lambda: b'Pf\n16 16\n-1.0\n' + grey(1, '<f4').tobytes(), None, 'floats'),
]  # fmt: skip


def write_pictures(root: Path) -> Path:
    """A folder ``val`` of one class with all of them, for which nothing else is needed."""
    folder = root / 'val' / 'all'
    folder.mkdir(parents=True)
    for picture in PICTURES:
        (folder / picture.name).write_bytes(picture.content())
    return root
