"""Lists of images: lines of a path and a label, as the original's ``meta_data/train.txt``."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from yacs.config import CfgNode

from internvl_ds.errors import ConfigError, shown
from internvl_ds.files.reading import open_data
from internvl_ds.pretrained.head import CLASSES_22K
from internvl_ds.train.datasets.sources import MOST_CLASSES

# The longest list, bytes; the original's of ImageNet-22K has some 500 MB.
_LIST_BYTES = 4 << 30


def find_list(config: CfgNode, split: str, *, has_folders: bool) -> Path | None:
    """The list of a split; None where there is none, and class folders are to be walked.

    It is ``train.txt`` or ``val.txt`` (of ImageNet-22K also ``22k_label.txt``) in DATA.META_DATA,
    or else in DATA_PATH/meta_data. Where the split has no class folders, DATA_PATH/../meta_data and
    ./meta_data are looked into too: beside the data, and where the original is started.

    Raises:
        ConfigError: when DATA.META_DATA is set, and has no list of this split.
    """
    of_22k = split == 'train' and config.DATA.DATASET == 'imagenet22K'
    names = [f'{split}.txt', *(['22k_label.txt'] if of_22k else [])]
    archive, at, _ = config.DATA.DATA_PATH.partition('.zip@')
    root = Path(archive).parent if at else Path(archive)
    if config.DATA.META_DATA:
        folders = [Path(config.DATA.META_DATA)]
    else:
        folders = [root / 'meta_data']
        folders += [] if has_folders else [root.parent / 'meta_data', Path('meta_data')]
    if path := next((f / name for f in folders for name in names if (f / name).is_file()), None):
        return path
    if config.DATA.META_DATA:
        raise ConfigError(f'DATA.META_DATA {config.DATA.META_DATA}: there is no {names[0]} in it')
    return None


def read_list(path: Path, classes: int) -> tuple[list[str], list[int]]:
    """Reads lines ``relative/path label``, of a space or a tab; of ImageNet-22K also WordNet ids.

    Args:
        path: the list.
        classes: labels are below it; 0: they are any from 0 on.

    Returns:
        Paths and labels, in the order of the list.

    Raises:
        ConfigError: names the line that is none, or has another label.
    """
    label_of = _label_of_wnid if classes == CLASSES_22K else int
    names: list[str] = []
    labels: list[int] = []
    try:
        with open_data(path) as file:
            if os.fstat(file.fileno()).st_size > _LIST_BYTES:
                raise ConfigError(f'{path}: is longer than {_LIST_BYTES} bytes, which no list is')
            for number, line in enumerate(file, 1):
                words = line.rsplit(None, 1)
                if not words:
                    continue
                label = _label(words[-1], label_of)
                if len(words) < 2 or not 0 <= label < (classes or MOST_CLASSES):
                    said = shown(line[:200].decode(errors='replace').strip())
                    raise ConfigError(
                        f'{path}, line {number}: {said!r} is not a path and a label of 0 ... '
                        f'{classes - 1 if classes else ""} (MODEL.NUM_CLASSES), with a space or a '
                        'tab between'
                    )
                names.append(os.fsdecode(words[0]))
                labels.append(label)
    except OSError as error:
        raise ConfigError(f'{path}: cannot be read: {error}') from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f'{path}: {error}') from error
    if not names:
        raise ConfigError(f'{path}: lists no image')
    return names, labels


def names_of_labels(names: Sequence[str], labels: Sequence[int], classes: int) -> list[str]:
    """Class names, where the paths of every label begin with a folder of its own; else none."""
    folders: dict[int, str] = {}
    for name, label in zip(names, labels, strict=True):
        folder, slash, _ = name.partition('/')
        if not slash or folders.setdefault(label, folder) != folder:
            return []
    if len(folders) < classes or len(set(folders.values())) < classes:
        return []
    return [folders[label] for label in range(classes)]


def _label(word: bytes, label_of: Callable[[str], int]) -> int:
    try:
        return label_of(word.decode())
    except (ValueError, KeyError):
        return -1


def _label_of_wnid(word: str) -> int:
    return int(word) if word.isdecimal() else _labels_22k()[word]


@functools.cache
def _labels_22k() -> dict[str, int]:
    from timm.data import ImageNetInfo

    return {wnid: label for label, wnid in enumerate(ImageNetInfo('imagenet-22k').label_names())}
