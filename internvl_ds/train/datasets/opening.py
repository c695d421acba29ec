"""Opens a split as DATA.* says: class folders, lists, zip files, ImageNet's variants."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from internvl_ds.errors import ConfigError, few
from internvl_ds.pretrained.head import CLASSES_1K, CLASSES_22K
from internvl_ds.train.datasets.archive import Archive
from internvl_ds.train.datasets.arrow import open_arrow
from internvl_ds.train.datasets.factory import open_factory
from internvl_ds.train.datasets.imagenet import (
    REAL,
    VARIANTS,
    Measure,
    is_val_name,
    labels_of_folders,
    real_answers,
    wnids_1k,
)
from internvl_ds.train.datasets.images import Images
from internvl_ds.train.datasets.lists import find_list, names_of_labels, read_list
from internvl_ds.train.datasets.sources import MOST_CLASSES, SOURCES, Folder, Source
from internvl_ds.train.datasets.tables import open_table
from internvl_ds.train.datasets.tars import open_tar, open_webdataset
from internvl_ds.train.datasets.transforms import build_transform
from internvl_ds.train.datasets.walk import (
    class_folders,
    is_image_name,
    walk_classes,
    without_hidden,
)

_log = logging.getLogger(__name__)

# Folders in ImageNet-22K's DATA_PATH that are no classes.
_NO_CLASSES = ('train', 'val', 'meta_data')


def open_split(config: CfgNode, split: str) -> Images:
    """Opens the images of ``train`` or ``val``, in an order that is the same on every rank.

    Raises:
        ConfigError: for what is missing or does not fit; the path is named.
    """
    data = config.DATA
    if data.FACTORY:
        return open_factory(config, split, build_transform(config, training=split == 'train'))
    if not data.DATA_PATH and not data.DATASET.startswith('hfds/'):
        raise ConfigError("DATA.DATA_PATH '' (--data-path): set it to the folder of the images")
    try:
        if data.DATASET in VARIANTS:
            images = _open_variant(config)
        elif data.DATASET.partition('/')[0] in SOURCES:
            images = _open_source(config, split)
        elif data.ZIP_MODE:
            images = _open_zip(config, split)
        else:
            images = _open_folder(config, split)
    except OSError as error:  # a folder without rights
        raise ConfigError(f'DATA.DATA_PATH {data.DATA_PATH}: {error}') from error
    if data.DATASET == REAL and split == 'val':
        names = list(map(os.fsdecode, images.source.names))
        answers = real_answers(data.REAL_LABELS, names, images.root)
        images.measure = Measure(answers=answers)
    return images


def evaluates_22k_as_1k(config: CfgNode, val_classes: int) -> bool:
    """Whether an ImageNet-22K head is measured on ImageNet-1K classes.

    So EVAL_22K_TO_1K says, or DATA.DATASET: 'imagenet22K' with a val folder of 1000 classes, and
    the data sets of ImageNet-1K's classes that only evaluate.
    """
    if config.MODEL.NUM_CLASSES != CLASSES_22K:
        return False
    dataset = config.DATA.DATASET
    of_22k = dataset == 'imagenet22K' and val_classes == CLASSES_1K
    return bool(config.EVAL_22K_TO_1K or of_22k or dataset in VARIANTS or dataset == REAL)


def _open_folder(config: CfgNode, split: str) -> Images:
    root = Path(config.DATA.DATA_PATH) / split
    leave_out: Sequence[str] = ()
    if config.DATA.DATASET == 'imagenet22K' and split == 'train' and not root.is_dir():
        root, leave_out = root.parent, _NO_CLASSES
    folders = class_folders(root, leave_out)
    lines = find_list(config, split, has_folders=bool(folders))
    if lines is not None:
        names, labels, classes, count = _listed(config, split, lines)
        source = Folder(root, names)
        for name in {names[0], names[len(names) // 2], names[-1]}:
            if not (root / name).exists():
                raise ConfigError(f'{lines}: names {name}, and there is no {root / name}')
        return _images(config, split, source, labels, classes, count)
    if not root.is_dir():
        raise ConfigError(
            f'DATA.DATA_PATH {config.DATA.DATA_PATH!r}: there is no folder {root}. It must hold '
            f'train/<class>/*.png and val/<class>/*.png (or .jpeg ...), or a list '
            f'meta_data/{split}.txt of the images in it; '
            f'`internvl-ds digits DIR` writes a small data set of that form'
        )
    if not folders:
        raise ConfigError(
            f'{root}: has no class folders, and there is no list of its images: put {split}.txt '
            f'(lines of a path in {root.name}/ and a label) into {root.parent}/meta_data, or set '
            'DATA.META_DATA to its folder'
        )
    _require_count(config, split, root, folders)
    names, labels = walk_classes(root, folders)
    return _images(config, split, Folder(root, names), labels, folders, len(folders))


def _open_zip(config: CfgNode, split: str) -> Images:
    path, at, inner = config.DATA.DATA_PATH.partition('.zip@')
    archive = Path(f'{path}.zip') if at else Path(path, f'{split}.zip')
    if not archive.is_file():
        raise ConfigError(
            f'DATA.ZIP_MODE True: there is no {archive}. DATA.DATA_PATH is the folder of train.zip '
            "and val.zip, or 'x.zip@/folder' with train/ and val/ in that folder of x.zip"
        )
    opened = Archive(archive)
    inside = f'{inner.strip("/")}/{split}'.lstrip('/')
    places = [inside] if at else [inside, '']  # train.zip holds train/<class>/ or <class>/
    folder = next((p for p in places if any(map(is_image_name, opened.files(p)))), places[-1])
    names = sorted(filter(is_image_name, opened.files(folder)))
    flat = [name for name in names if '/' not in name]
    lines: Path | None = archive.parent / f'{split}_map.txt'  # as Swin's reader has it
    if lines is None or not lines.is_file():
        lines = find_list(config, split, has_folders=not flat)
    if lines is not None:
        names, labels, classes, count = _listed(config, split, lines)
        return _images(config, split, opened.choose(folder, names), labels, classes, count)
    if flat or not names:
        raise ConfigError(
            f'{opened.path}: {few(flat) or "no image"} in {folder or "it"}, where class folders '
            f'are due; a list {split}_map.txt (lines of a path below that and a label) beside it '
            'does without them'
        )
    folders = without_hidden(archive, sorted({name.partition('/')[0] for name in names}))
    names = [name for name in names if not name.startswith('.')]
    _require_count(config, split, archive, folders)
    index = {name: label for label, name in enumerate(folders)}
    labels = [index[name.partition('/')[0]] for name in names]
    source = opened.choose(folder, names)
    return _images(config, split, source, labels, folders, len(folders))


def _open_source(config: CfgNode, split: str) -> Images:
    """Opens what has its labels with it, and checks these against MODEL.NUM_CLASSES."""
    kind, path = config.DATA.DATASET.partition('/')[0], Path(config.DATA.DATA_PATH)
    if kind in ('csv', 'jsonl'):
        opened = open_table(config, split)
    elif kind == 'hfds':
        opened = open_arrow(config, split)
    else:
        opened = (open_tar if kind == 'tar' else open_webdataset)(path, split)
    source, labels = opened.source, opened.labels
    if opened.classes:
        _require_count(config, split, Path(source.root), opened.classes)
    several = config.DATA.MULTI_LABEL
    expected = config.MODEL.NUM_CLASSES or min(opened.count, MOST_CLASSES)
    if split == 'val' and evaluates_22k_as_1k(config, len(opened.classes)):
        expected = CLASSES_1K
    for index, label in enumerate(labels):
        if isinstance(label, list) != several:
            raise ConfigError(
                f'{source.where(index)}: has the label {label}, and DATA.MULTI_LABEL is {several}'
            )
        if max(label if several else [label], default=0) >= expected:
            raise ConfigError(
                f'{source.where(index)}: label {label} is not of 0 ... {expected - 1} '
                f'(MODEL.NUM_CLASSES {config.MODEL.NUM_CLASSES})'
            )
    _log.info('%s: %d images, %d classes: %s', split, len(labels), expected, source.root)
    return _images(config, split, source, labels, opened.classes, expected)


def _open_variant(config: CfgNode) -> Images:
    dataset, path = config.DATA.DATASET, Path(config.DATA.DATA_PATH)
    variant = VARIANTS[dataset]
    if config.MODEL.NUM_CLASSES not in (0, CLASSES_1K, CLASSES_22K):
        raise ConfigError(
            f'DATA.DATASET {dataset!r} measures a head of {CLASSES_1K} or {CLASSES_22K} classes, '
            f'and MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}'
        )
    root = next((path / name for name in variant.folders if (path / name).is_dir()), path)
    folders = class_folders(root)
    if not folders:
        inside = f' or {path / variant.folders[0]}' if variant.folders else ''
        raise ConfigError(f'DATA.DATASET {dataset!r}: there are no class folders in {path}{inside}')
    labels_1k = labels_of_folders(root, folders, numbers=dataset == 'imagenetv2')
    names, labels = walk_classes(root, folders)
    if (len(names), len(folders)) != (variant.images, variant.classes):
        _log.warning(
            f'{root}: has {len(names)} images of {len(folders)} classes, and {dataset} as it is '
            f'published has {variant.images} of {variant.classes}: the accuracy is not comparable'
        )
    columns = torch.tensor(labels_1k) if variant.masked else None
    if columns is None:
        labels = [labels_1k[label] for label in labels]
    source, transform = Folder(root, names), build_transform(config, training=False)
    classes = wnids_1k()
    measure, upright = Measure(columns), bool(config.DATA.EXIF_ROTATE)
    return Images(source, labels, transform, classes, len(classes), measure, upright=upright)


def _listed(
    config: CfgNode, split: str, lines: Path
) -> tuple[list[str], list[int], Sequence[str], int]:
    count = config.MODEL.NUM_CLASSES
    if split == 'val' and evaluates_22k_as_1k(config, CLASSES_1K):
        count = CLASSES_1K
    names, labels = read_list(lines, count)
    count = count or max(labels) + 1
    _log.info('%s: %d images, listed in %s', split, len(names), lines)
    classes: Sequence[str] = names_of_labels(names, labels, count)
    if config.EVAL_MODE and count == CLASSES_1K and is_val_name(names[0]):
        classes = wnids_1k()  # in training the class folders' names are the ones to keep
    return names, labels, classes, count


def _images(
    config: CfgNode,
    split: str,
    source: Source,
    labels: Sequence[Any],
    classes: Iterable[str],
    count: int,
) -> Images:
    transform = build_transform(config, training=split == 'train')
    # The original reads these through OpenCV, and its variants through PIL.
    upright = config.DATA.EXIF_ROTATE is not False
    return Images(
        source, labels, transform, list(classes), count,
        upright=upright, multi_label=config.DATA.MULTI_LABEL,
    )  # fmt: skip


def _require_count(config: CfgNode, split: str, root: Path, folders: Sequence[str]) -> None:
    expected, count = config.MODEL.NUM_CLASSES, len(folders)
    if split == 'val' and evaluates_22k_as_1k(config, count):
        expected = CLASSES_1K
    if expected in (0, count):
        return
    other = root.parent / ('train' if split == 'val' else 'val')
    theirs = class_folders(other) if root.is_dir() else []
    words = differing(root, folders, other, theirs) if theirs else ''
    raise ConfigError(
        f'{root} has {count} classes, and the model is to tell {expected} apart '
        f'(MODEL.NUM_CLASSES {config.MODEL.NUM_CLASSES}){words and "; "}{words}'
    )


def differing(one: object, ours: Sequence[str], other: object, theirs: Sequence[str]) -> str:
    """Says which classes are in one place alone; '' where there are none."""
    places = ((one, sorted({*ours} - {*theirs})), (other, sorted({*theirs} - {*ours})))
    return ', '.join(f'only {place} has {few(names)}' for place, names in places if names)
