"""A split's images, decoded and transformed, with labels; errors name the file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from internvl_ds.errors import DataError
from internvl_ds.train.datasets.imagenet import Measure
from internvl_ds.train.datasets.sources import Source
from internvl_ds.train.datasets.transforms import Transform


class Images(Dataset):
    """Yields (transformed image, label).

    Attributes:
        source: the encoded images.
        labels: int64, one an image.
        classes: names by label; none where they are not known.
        num_classes: how many classes the labels tell apart.
        measure: how `evaluate` counts hits.
        upright: whether an image is turned as its EXIF orientation says, as OpenCV does.
    """

    def __init__(
        self,
        source: Source,
        labels: Sequence[int],
        transform: Transform,
        classes: Sequence[str],
        num_classes: int,
        measure: Measure | None = None,
        *,
        upright: bool = False,
    ) -> None:
        self.source, self.labels = source, np.array(labels, dtype=np.int64)
        self.transform, self.classes, self.num_classes = transform, list(classes), num_classes
        self.measure, self.upright = measure or Measure(), upright

    @property
    def root(self) -> str:
        """The folder or archive, for messages."""
        return self.source.root

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """One image and its label.

        Raises:
            DataError: names the file, when it cannot be read, decoded or transformed.
        """
        try:
            image: Image.Image = Image.open(io.BytesIO(self.source.read(index)))
            if self.upright:
                image = ImageOps.exif_transpose(image)
            # As torchvision's loader decodes.
            return self.transform(image.convert('RGB')), int(self.labels[index])
        except Exception as error:
            where, reason = self.source.where(index), f'{type(error).__name__}: {error}'
            raise DataError(f'{where} cannot be used as an image: {reason}') from error
