"""Mean average precision: how logits rank the images of each class, where images have several."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist

from internvl_ds.errors import ConfigError


class Ranking:
    """The logits and targets of all images of a data set, whichever rank evaluates them.

    A rank holds images x classes x 8 bytes.
    """

    def __init__(self, total: int, numbers: Iterator[int]) -> None:
        """Begins without any.

        Args:
            total: images in the data set.
            numbers: those of the images that this rank evaluates, in the order of its batches.
        """
        self._total, self._numbers = total, numbers
        self._rows: torch.Tensor | None = None

    def add(self, logits: torch.Tensor, targets: torch.Tensor, valid: int) -> None:
        """Takes a batch: (images, classes) each, of which the first ``valid`` images count."""
        if self._rows is None:
            shape = 2, self._total, logits.shape[-1]
            self._rows = torch.zeros(shape, device=logits.device)
        numbers = list(islice(self._numbers, len(targets)))[:valid]
        self._rows[:, numbers] = torch.stack([logits[:valid], targets[:valid]])

    def mean_average_precision(self) -> float:
        """The mean over the classes that any image has. Collective: every rank calls it.

        Raises:
            ConfigError: when no image has a label.
        """
        assert self._rows is not None
        if dist.is_initialized():
            dist.all_reduce(self._rows)  # each row is one rank's, and zero on the others
        logits, targets = self._rows.cpu().numpy()
        present = [c for c in range(targets.shape[1]) if targets[:, c].any()]
        if not present:
            raise ConfigError('DATA.MULTI_LABEL True: none of the images evaluated has a label')
        return float(np.mean([average_precision(logits[:, c], targets[:, c]) for c in present]))


def average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """The area under a class's steps of precision over recall; equal scores are one step.

    Args:
        scores: one an image.
        targets: 1 for an image of the class, else 0; one of them is 1.
    """
    order = np.argsort(-scores, kind='stable')
    scores, hits = scores[order], np.cumsum(targets[order], dtype=np.float64)
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    precision, recall = hits[ends] / (ends + 1), hits[ends] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0) * precision))
