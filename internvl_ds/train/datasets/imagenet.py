"""ImageNet's variants: which logits they are measured against, and their labels.

Nothing is listed here: WordNet ids and ReaL's labels come with timm.
"""

from __future__ import annotations

import functools
import json
import pkgutil
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from internvl_ds.errors import ConfigError, brief, few
from internvl_ds.files.reading import parse_json, read_json
from internvl_ds.pretrained.head import CLASSES_1K

REAL = 'imagenet-real'


@dataclass(frozen=True)
class Variant:
    """A data set of ImageNet-1K's classes that there is to evaluate only.

    Attributes:
        title: its column in the original's table.
        images, classes: how many the published one has.
        masked: whether only the logits of its own classes count.
        folders: below DATA.DATA_PATH, where it may be; the path itself is tried last.
    """

    title: str
    images: int
    classes: int = CLASSES_1K
    masked: bool = False
    folders: tuple[str, ...] = ()


VARIANTS = {
    'imagenetv2': Variant(
        'IN-V2',
        10000,
        folders=('ImageNetV2-matched-frequency', 'imagenetv2-matched-frequency-format-val'),
    ),
    'imagenet_a': Variant('IN-A', 7500, 200, masked=True),
    'imagenet_r': Variant('IN-R', 30000, 200, masked=True),
    'imagenet_sketch': Variant('IN-Sketch', 50889),
}

_VAL_NAME = re.compile(r'ILSVRC2012_val_(\d{8})\.\w+')


@dataclass(frozen=True)
class Measure:
    """How the logits of a data set's images become hits.

    Attributes:
        columns: int64, the logits that count, in the order of the labels; None: all.
        answers: for each image the labels that are right, none where it does not count; None: an
            image's own label is, and all count.
    """

    columns: torch.Tensor | None = None
    answers: Sequence[Sequence[int]] | None = None

    def answers_of(self, numbers: Iterable[int], valid: int) -> list[Sequence[int]] | None:
        """The answers of a batch's images, given their numbers; of the first ``valid`` alone."""
        if self.answers is None:
            return None
        return [self.answers[number] for number in numbers][:valid]


@functools.cache
def wnids_1k() -> tuple[str, ...]:
    """ImageNet-1K's WordNet ids by label."""
    # timm takes seconds to import.
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo('imagenet-1k').label_names())


def labels_of_folders(root: Path, folders: Sequence[str], *, numbers: bool) -> list[int]:
    """ImageNet-1K's label of each class folder.

    Args:
        root: where they are, for the error.
        folders: their names: WordNet ids.
        numbers: whether they may, all of them, be labels instead, as ImageNetV2's are.

    Raises:
        ConfigError: names the folders that are neither, and labels that two folders have.
    """
    if numbers and all(re.fullmatch(r'\d{1,4}', name) for name in folders):
        labels = [int(name) for name in folders]
        unknown = [str(label) for label in labels if label >= CLASSES_1K]
    else:
        index = {wnid: label for label, wnid in enumerate(wnids_1k())}
        unknown = [name for name in folders if name not in index]
        labels = [index.get(name, -1) for name in folders]
    if unknown:
        or_labels = f', nor all labels 0 ... {CLASSES_1K - 1}' if numbers else ''
        raise ConfigError(
            f'{root}: {len(unknown)} class folders have names that are no WordNet ids of '
            f'ImageNet-1K (n01440764 ...){or_labels}: {few(unknown)}'
        )
    if len(set(labels)) < len(labels):
        raise ConfigError(f'{root}: class folders have the same label: {few(sorted(labels))}')
    return labels


def real_answers(path: str, names: Sequence[str], root: str) -> list[tuple[int, ...]]:
    """ReaL's labels of ImageNet-1K's validation images, by the numbers in their names.

    Args:
        path: a JSON of 50000 lists of labels (DATA.REAL_LABELS); '' is the one that timm ships.
        names: of the images, as ILSVRC2012_val_00000001.JPEG, in folders or not.
        root: where they are, for the error.

    Raises:
        ConfigError: for a file that is no such list, and an image without a number in it.
    """
    labels = _real_labels(path)
    answers = []
    for name in names:
        match = _VAL_NAME.fullmatch(name.rpartition('/')[2])
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(labels):
            raise ConfigError(
                f'{root}/{name}: ReaL has labels for ILSVRC2012_val_00000001 ... '
                f'_{len(labels):08d} by file name, and this is none of them'
            )
        answers.append(tuple(labels[number - 1]))
    return answers


def is_val_name(name: str) -> bool:
    """Whether this is the name of one of ImageNet-1K's validation images."""
    return _VAL_NAME.fullmatch(name.rpartition('/')[2]) is not None


def _real_labels(path: str) -> list[list[int]]:
    try:
        if path:
            labels = read_json(path)
        else:
            data = pkgutil.get_data('timm.data', '_info/imagenet_real_labels.json')
            labels = parse_json((data or b'').decode())
    except (OSError, ValueError, json.JSONDecodeError) as error:
        where = f'DATA.REAL_LABELS {path}' if path else "timm's imagenet_real_labels.json"
        raise ConfigError(f'{where}: cannot be read: {error}') from error
    known = range(CLASSES_1K)
    if not isinstance(labels, list) or not all(
        isinstance(each, list) and all(type(label) is int and label in known for label in each)
        for each in labels
    ):
        raise ConfigError(
            f'DATA.REAL_LABELS {path}: holds {brief(labels)}, and not a list of labels '
            f'(0 ... {CLASSES_1K - 1}) for each validation image'
        )
    return labels
