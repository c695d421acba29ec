"""Check a folder of training images before a run does: faults, duplicates, sizes, balance.

    internvl-ds data check DIR [--val DIR] [--json FILE] [--sheet FILE.png] [--processes N]

DIR has train/<class>/*.png and val/<class>/*.png, as DATA.DATA_PATH, or is one of the two. Every
image is read and decoded as training does. What training refuses, or what makes an accuracy wrong,
is marked WRONG: an image that cannot be used, a class without one, a class that only one split has,
an image that is in both splits. The rest is told, and is no fault.

Exit statuses: 0 nothing is wrong; 1 something is; 2 wrong usage, or no images.

--json writes one object: ``wrong``; ``between``, for each image in both splits an object from the
name of a split to paths in it; ``other_classes``, from the name of a split to the classes that only
it has; ``splits``, from its name to ``path``; ``images``; ``classes``, from a name to its number of
images; ``empty``, names of classes; ``unreadable``, each with ``name`` and ``error``; ``kinds``,
from a kind ('CMYK', '16-bit', 'palette', 'animated', ...) to paths; ``warnings`` of Pillow, each
with ``name`` and ``warning``; ``duplicates``, lists of paths; ``duplicates_across_classes``, how
many of these are in several classes; ``hidden_folders``, ``other_files`` and ``linked_twice``,
paths; ``images_per_class``, ``width``, ``height`` and ``bytes``, each with ``min``, ``median`` and
``max``, or null where there is no image. Paths are below the ``path`` of the split.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_ds.errors import DataError
from internvl_ds.tools.cli.quantities import whole
from internvl_ds.tools.text import json_text, say

OK, WRONG = 0, 1

_EPILOG = """exit status:
  0  nothing is wrong
  1  an image cannot be used, a class has none, or an image or class is where it must not be
  2  wrong usage, or no images
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the action."""
    actions = parser.add_subparsers(dest='action', metavar='ACTION', required=True)
    text = 'decode every image; name what is faulty, odd or there twice'
    check = actions.add_parser(
        'check', help=text, description=text, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = check.add_argument
    add('dir', type=Path, metavar='DIR', help='with train/ and val/ in it, or with class folders')
    add('--val', type=Path, metavar='DIR', help='class folders for validation (default: DIR/val)')
    add('--json', type=Path, metavar='FILE', help='write one JSON object there')
    add('--sheet', type=Path, metavar='FILE.png', help='write samples of the first 1000 classes')
    cores = len(os.sched_getaffinity(0))
    text = f'that decode (default: the CPUs, {cores})'
    add('--processes', type=whole(1), metavar='N', default=cores, help=text)
    check.set_defaults(act=_check)


def run(args: argparse.Namespace) -> int:
    """Runs the action."""
    status: int = args.act(args)
    return status


def _check(args: argparse.Namespace) -> int:
    from internvl_ds.files import write_text
    from internvl_ds.tools.data.look import look_at
    from internvl_ds.tools.data.report import text_of, tree_of
    from internvl_ds.tools.data.sheet import choose, write_sheet
    from internvl_ds.tools.data.splits import find_splits

    for path in (args.json, args.sheet):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise DataError(f'{path}: cannot be written: it is a folder, or its folder is missing')
    splits = find_splits(args.dir, args.val)
    looked = []
    for split in splits:
        paths = [split.path(number) for number in range(len(split.names))]
        with _progress(split.name, len(paths)) as done:
            looked.append(look_at(paths, args.processes, done))
    found = tree_of(splits, looked)
    try:
        if args.json is not None:
            write_text(args.json, json_text(found) + '\n')
        if args.sheet is not None:
            chosen = choose(splits[0], looked[0])
            with _progress('sheet', sum(map(len, chosen.values()))) as done:
                write_sheet(args.sheet, splits[0], chosen, args.processes, done)
    except OSError as error:
        raise DataError(f'{error.filename}: cannot be written: {error.strerror}') from error
    say(text_of(found))
    return WRONG if found['wrong'] else OK


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar, on a terminal alone; gives the function that moves it."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit='img', file=sys.stderr, disable=None) as bar:
        yield bar.update
