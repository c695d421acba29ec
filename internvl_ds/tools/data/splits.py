"""The splits of an image folder: their classes, and the files in each."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from internvl_ds.errors import DataError
from internvl_ds.train.datasets.walk import files_of_class, folders_in, is_image_name


@dataclass
class Split:
    """One split, in the order in which training numbers its images.

    Attributes:
        name: 'train' or 'val'; another where the folder holds classes itself.
        root: its folder, with a folder for each class.
        classes: names by label.
        names: of the images, paths below ``root``.
        labels: one an image.
        hidden: folders that are no classes, as their names begin with a dot.
        others: files in class folders whose names are not those of images.
        twice: folders that links lead to a second time, and that are read once.
    """

    name: str
    root: Path
    classes: list[str]
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)

    def path(self, number: int) -> str:
        """Path of an image."""
        return os.path.join(self.root, self.names[number])


def find_splits(folder: Path, val: Path | None) -> list[Split]:
    """Finds the images of ``folder/train`` and ``folder/val``, or of the classes in ``folder``.

    Args:
        folder: as DATA.DATA_PATH, or one split.
        val: the classes for validation, in the place of ``folder/val``.

    Raises:
        DataError: for what is no folder, cannot be read, or has no class folders.
    """
    roots = {name: folder / name for name in ('train', 'val') if (folder / name).is_dir()}
    if not roots:
        roots = {'train' if val else folder.resolve().name or 'images': folder}
    if val is not None:
        roots['val'] = val
    try:
        return [_open(name, root) for name, root in roots.items()]
    except OSError as error:
        raise DataError(f'{error.filename}: cannot be read: {error.strerror}') from error


def _open(name: str, root: Path) -> Split:
    folders = folders_in(root)
    hidden = [folder for folder in folders if folder.startswith('.')]
    split = Split(name, root, [each for each in folders if each not in hidden], hidden=hidden)
    if not split.classes:
        raise DataError(
            f'{root}: has no class folders; what is looked at is DIR/train/<class>/*.png and '
            'DIR/val/<class>/*.png, or one of the two (a zip file is to be unpacked)'
        )
    for label, folder in enumerate(split.classes):
        for file in files_of_class(root, folder, split.twice):
            if is_image_name(file):
                split.names.append(file)
                split.labels.append(label)
            else:
                split.others.append(file)
    return split
