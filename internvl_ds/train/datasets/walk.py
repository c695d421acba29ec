"""Image folders: one folder per class, links followed, no folder of a class read twice."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from internvl_ds.errors import ConfigError, few

# As torchvision has them, whose import takes seconds.
_ENDINGS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')

_log = logging.getLogger(__name__)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(_ENDINGS)


def class_folders(root: Path, leave_out: Collection[str] = ()) -> list[str]:
    """Names of the folders in ``root``, sorted as text; none where there is no such folder.

    Hidden ones, as a notebook's ``.ipynb_checkpoints``, are no classes; the log names them.
    """
    if not root.is_dir():
        return []
    return without_hidden(root, [name for name in folders_in(root) if name not in leave_out])


def folders_in(root: Path) -> list[str]:
    """Names of all folders in ``root``, sorted as text; hidden ones too."""
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def without_hidden(root: Path, folders: Sequence[str]) -> list[str]:
    """The class folders of an image folder or archive whose names do not begin with a dot."""
    if hidden := [name for name in folders if name.startswith('.')]:
        _log.warning('%s: hidden folders are no classes: %s', root, few(hidden))
    return [name for name in folders if not name.startswith('.')]


def walk_classes(root: Path, classes: Collection[str]) -> tuple[list[str], list[int]]:
    """Finds the images below ``root/<class>``, in the order of torchvision's ImageFolder.

    A folder that links lead to a second time, in one class, is read once, and a warning names it:
    two links to ``.`` would otherwise be a tree without an end.

    Args:
        root: the folder of a split.
        classes: names of the class folders in it, by label.

    Returns:
        The images' paths below ``root``, and their labels.

    Raises:
        ConfigError: names the classes without an image.
        OSError: for a folder that cannot be read.
    """
    names: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    twice: list[str] = []
    for label, name in enumerate(classes):
        files = [file for file in files_of_class(root, name, twice) if is_image_name(file)]
        names += files
        labels += [label] * len(files)
        if not files:
            empty.append(name)
    if twice:
        _log.warning(
            f'{root}: links lead to {len(twice)} folders that were read already, or to all of '
            f'them; their images count once: {few(twice)}'
        )
    if empty:
        raise ConfigError(f'{root}: no image in the class folders {few(empty)}')
    return names, labels


def files_of_class(root: Path, name: str, twice: list[str]) -> list[str]:
    """Paths below ``root`` of all files of a class, in the order of torchvision's ImageFolder.

    Args:
        root: the folder of a split.
        name: the class folder in it.
        twice: folders that links lead to a second time are added to it, and not read again.

    Raises:
        OSError: for a folder that cannot be read.
    """
    below = sorted(_folders(root, name, twice))
    return [os.path.join(folder, file) for folder, files in below for file in sorted(files)]


def _folders(root: Path, name: str, twice: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The folders of a class with the files in each; links to ones seen before go to ``twice``."""
    visited, waiting = {_identity(root)}, [name]
    while waiting:
        folder = waiting.pop()
        path = root / folder
        if (identity := _identity(path)) in visited:
            twice.append(folder)
            continue
        visited.add(identity)
        files = []
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda e: e.name, reverse=True):
                if entry.is_dir():
                    waiting.append(os.path.join(folder, entry.name))
                else:
                    files.append(entry.name)
        yield folder, files


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
