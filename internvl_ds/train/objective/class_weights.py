"""DATA.CLASS_WEIGHTS: how much an image counts in the loss, by its class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from yacs.config import CfgNode

from internvl_ds.errors import ConfigError, few

if TYPE_CHECKING:
    from internvl_ds.train.datasets.images import Images

BALANCED = 'balanced'


def class_weights(config: CfgNode, images: Images) -> torch.Tensor | None:
    """The weights of the classes for the training loss; None where DATA.CLASS_WEIGHTS is.

    'balanced' is images / (classes x images of the class), as of scikit-learn's
    compute_class_weight: the mean over the training images is 1. With TRAIN.LOSS 'bce' it is images
    without the class / images with it, as torch's BCEWithLogitsLoss has for its pos_weight.

    Args:
        config: DATA.CLASS_WEIGHTS, and TRAIN.LOSS.
        images: of training; all of them, on every rank.

    Returns:
        float32, (classes,).

    Raises:
        ConfigError: for a class without an image, labels that are not known beforehand, and as many
            weights as there are no classes.
    """
    weights, count = config.DATA.CLASS_WEIGHTS, images.num_classes
    if weights is None:
        return None
    if weights != BALANCED:
        if len(weights) != count:
            raise ConfigError(
                f'DATA.CLASS_WEIGHTS has {len(weights)} numbers, and {images.root} has {count} '
                'classes'
            )
        return torch.tensor(weights, dtype=torch.float32)
    if config.DATA.FACTORY:
        raise ConfigError(
            f"DATA.CLASS_WEIGHTS 'balanced': the labels of DATA.FACTORY {config.DATA.FACTORY!r} "
            'are known when its items are read, and not before: list the weights'
        )
    labels = images.labels
    have = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=count)
    empty = [f'{label} ({images.classes[label]})' if images.classes else str(label)
             for label in np.flatnonzero(have == 0)]  # fmt: skip
    if empty:
        raise ConfigError(
            f"DATA.CLASS_WEIGHTS 'balanced': {images.root} has no image of the classes "
            f'{few(empty)}: list the weights'
        )
    one_of = config.TRAIN.LOSS != 'bce'
    if not one_of and (everywhere := np.flatnonzero(have == len(labels)).tolist()):
        raise ConfigError(
            f"DATA.CLASS_WEIGHTS 'balanced': all images of {images.root} have the classes "
            f"{few(list(map(str, everywhere)))}, which would weigh 0 with TRAIN.LOSS 'bce': list "
            'the weights'
        )
    balanced = len(labels) / (count * have) if one_of else (len(labels) - have) / have
    return torch.from_numpy(balanced).float()
