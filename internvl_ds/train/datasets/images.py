"""A split's images, decoded and transformed, with labels; errors name the file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from internvl_ds.errors import DataError, shown
from internvl_ds.train.datasets.decode import decode
from internvl_ds.train.datasets.imagenet import Measure
from internvl_ds.train.datasets.skipping import Skipped, is_of_file
from internvl_ds.train.datasets.sources import Source
from internvl_ds.train.datasets.transforms import Transform

_ADVICE = (
    "; mend or remove it (DATA.ON_ERROR 'skip' takes other images in training, never in evaluation)"
)


def unusable(where: str, error: Exception) -> DataError:
    """The error of an image that cannot be read, decoded or transformed."""
    return DataError(
        f'{where} cannot be used as an image: {shown(f"{type(error).__name__}: {error}")}'
    )


def hot(labels: Any, classes: int) -> torch.Tensor:
    """The target of an image of several labels: float32, 1 for each of them and 0 elsewhere."""
    target = torch.zeros(classes)
    target[torch.as_tensor(labels, dtype=torch.int64)] = 1
    return target


class Images(Dataset):
    """Yields (transformed image, label), or for a label what `hot` makes of several.

    Attributes:
        source: the encoded images.
        labels: int64, one an image; where images have several, bool, (images, classes).
        classes: names by label; none where they are not known.
        num_classes: how many classes the labels tell apart.
        measure: how `evaluate` counts hits.
        upright: whether an image is turned as its EXIF orientation says.
        multi_label: whether an image has a target of `hot`, and no label.
        skipped: takes the images that cannot be used, and has others in their places; None: such an
            image is an error.
    """

    def __init__(
        self,
        source: Source,
        labels: Sequence[Any],
        transform: Transform,
        classes: Sequence[str],
        num_classes: int,
        measure: Measure | None = None,
        *,
        upright: bool = False,
        multi_label: bool = False,
    ) -> None:
        self.source, self.multi_label = source, multi_label
        if multi_label:
            self.labels = np.zeros((len(labels), num_classes), dtype=bool)
            for row, several in zip(self.labels, labels, strict=True):
                row[list(several)] = True
        else:
            self.labels = np.array(labels, dtype=np.int64)
        self.transform, self.classes, self.num_classes = transform, list(classes), num_classes
        self.measure, self.upright = measure or Measure(), upright
        self.skipped: Skipped | None = None

    @property
    def root(self) -> str:
        """The folder or archive, for messages."""
        return self.source.root

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """One image and its label; where images are skipped, those of the image in its place.

        Raises:
            DataError: names the file, when it cannot be read, decoded or transformed.
        """
        if self.skipped is None:
            try:
                return self._load(index)
            except DataError as error:
                raise DataError(f'{error}{_ADVICE}') from error.__cause__
        for number in itertools.chain([index], self.skipped.others(index)):
            try:
                return self._load(number)
            except DataError as error:
                if not is_of_file(error.__cause__):
                    raise
                self.skipped.add(number, str(error))
        raise AssertionError  # there is no last one

    def _load(self, index: int) -> tuple[Any, Any]:
        try:
            image = decode(self.source.read(index), upright=self.upright)
            label = self.labels[index]
            return self.transform(image), torch.tensor(label).float() if label.ndim else int(label)
        except Exception as error:
            raise unusable(shown(self.source.where(index)), error) from error
