"""A contact sheet: a row of samples for each class, in one PNG."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from internvl_ds.errors import shown
from internvl_ds.files import replacing
from internvl_ds.files.reading import read_bytes
from internvl_ds.tools.data.look import Looked, in_processes
from internvl_ds.tools.data.splits import Split
from internvl_ds.train.datasets.decode import IMAGE_BYTES, decode

SIDE, GAP, LABEL = 96, 4, 160  # pixels: of a sample, between samples, of the class name's column
COLUMNS = 8  # samples of a class
MOST_CLASSES = 1000
_PAPER, _INK = (255, 255, 255), (0, 0, 0)


def choose(split: Split, looked: Sequence[Looked]) -> dict[int, list[int]]:
    """Numbers of a few readable images of each class, evenly from its first to its last."""
    of_class: dict[int, list[int]] = defaultdict(list)
    for number, label in enumerate(split.labels):
        if label < MOST_CLASSES and not looked[number].error:
            of_class[label].append(number)
    chosen = {}
    for label, numbers in of_class.items():
        count = min(COLUMNS, len(numbers))
        chosen[label] = [numbers[place * len(numbers) // count] for place in range(count)]
    return chosen


def write_sheet(
    path: Path,
    split: Split,
    chosen: dict[int, list[int]],
    processes: int,
    done: Callable[[int], object],
) -> None:
    """Writes the samples that `choose` chose, with the names of their classes.

    Raises:
        OSError: when the file cannot be written.
    """
    rows = min(len(split.classes), MOST_CLASSES)
    step = SIDE + GAP
    sheet = Image.new('RGB', (LABEL + COLUMNS * step, rows * step + GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for label in range(rows):
        text = shown(split.classes[label]).encode('latin-1', 'replace').decode('latin-1')
        draw.text((GAP, GAP + label * step), text[:24], fill=_INK, font=font)
    places = [(label, place) for label in chosen for place in range(len(chosen[label]))]
    paths = [split.path(chosen[label][place]) for label, place in places]
    samples = in_processes(sample, paths, processes, done)
    for (label, place), (size, pixels) in zip(places, samples, strict=True):
        corner = LABEL + place * step, GAP + label * step
        sheet.paste(Image.frombytes('RGB', size, pixels), corner)
    with replacing(path) as file:
        sheet.save(file, 'PNG')


def sample(path: str) -> tuple[tuple[int, int], bytes]:
    """An image, small enough for the sheet: its size and its RGB pixels."""
    image = decode(read_bytes(path, IMAGE_BYTES), upright=True)
    image.thumbnail((SIDE, SIDE))
    return image.size, image.tobytes()
