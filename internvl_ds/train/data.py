"""Image folders, samplers and loaders: the same data in the same order, however often resumed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from timm.data import Mixup
from torch.utils.data import DataLoader, Sampler
from torchvision.datasets import ImageFolder
from yacs.config import CfgNode

from internvl_ds.errors import ConfigError, DataError
from internvl_ds.pretrained.head import CLASSES_1K, CLASSES_22K
from internvl_ds.train.sampler import SeededImages, TrainSampler
from internvl_ds.train.transforms import build_transform
from internvl_ds.train.workers import Loader


@dataclass(frozen=True)
class Loaders:
    """What a run reads.

    Attributes:
        train: yields (images, labels) of this rank; None in EVAL_MODE and THROUGHPUT_MODE.
        val: this rank's share, sampled by `EvalSampler`.
        mixup: to be applied to each training batch on the device; None where the config has none.
        classes: names of the labels 0, 1, ... that the model tells apart; none where an
            ImageNet-22K head is only measured on ImageNet-1K.
    """

    train: DataLoader | None
    val: DataLoader
    mixup: Mixup | None
    classes: Sequence[str] = ()


def build_loaders(config: CfgNode, rank: int, world_size: int) -> Loaders:
    """Opens DATA_PATH/train and DATA_PATH/val, one folder per class, and makes this rank's loaders.

    Raises:
        ConfigError: for a missing or empty folder, classes that do not fit MODEL.NUM_CLASSES or
            each other, fewer training images than one global batch, a storage mode that is not
            supported, and an odd batch with mixup.
    """
    _refuse_unsupported(config)
    val_set = _open_folder(config, 'val')
    train_loader, classes = None, val_set.classes
    if evaluates_22k_as_1k(config, len(classes)):
        classes = []
    if not (config.EVAL_MODE or config.THROUGHPUT_MODE):
        train_set = _open_folder(config, 'train')
        _check_same_classes(config, train_set, val_set)
        classes = train_set.classes
        train_loader = _train_loader(config, train_set, rank, world_size)
    val_loader = _loader(config, val_set, EvalSampler(len(val_set), world_size, rank))
    return Loaders(train_loader, val_loader, build_mixup(config), classes)


def order_of(loader: DataLoader, seed: int) -> dict[str, Any]:
    """What the order of a training loader's images depends on, beside the epoch.

    The number of images, the seed, and a digest of the files' names below their folder.
    """
    assert isinstance(loader.dataset, SeededImages)
    folder = loader.dataset.images
    digest = xxhash.xxh3_64()
    for path, _ in folder.samples:
        digest.update(path[len(str(folder.root)) :].encode(errors='surrogateescape') + b'\0')
    return {'images': len(folder), 'SEED': abs(seed), 'file names': digest.hexdigest()}


def build_mixup(config: CfgNode) -> Mixup | None:
    """Builds timm's Mixup; None unless AUG.MIXUP, AUG.CUTMIX or AUG.CUTMIX_MINMAX is set.

    Raises:
        ConfigError: for an odd DATA.BATCH_SIZE, since images are mixed in pairs.
    """
    aug = config.AUG
    if not (aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX):
        return None
    if config.DATA.BATCH_SIZE % 2:
        raise ConfigError(
            f'DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} is odd, and AUG.MIXUP {aug.MIXUP} / '
            f'AUG.CUTMIX {aug.CUTMIX} mix images in pairs: make it even or set both to 0'
        )
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=config.MODEL.NUM_CLASSES,
    )


def shard_indices(total: int, world_size: int, rank: int) -> tuple[list[int], int]:
    """Deals ``range(total)`` out to the ranks, equally long for each.

    Every rank must run the same number of forward passes (at ZeRO stage 3 each one is a
    collective), so short shares are filled up with an image that is not to be counted.

    Returns:
        The rank's indices, ``ceil(total / world_size)`` of them, and how many at the front are
        its own; over all ranks those are each index exactly once.
    """
    own = list(range(rank, total, world_size))
    length = -(-total // world_size)
    return own + [0] * (length - len(own)), len(own)


class EvalSampler(Sampler[int]):
    """Yields a rank's share of a data set in order, padded as `shard_indices` says.

    Attributes:
        num_valid: how many of the yielded indices, from the first on, count.
    """

    def __init__(self, total: int, world_size: int, rank: int) -> None:
        self._indices, self.num_valid = shard_indices(total, world_size, rank)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global generators, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def start_epoch(
    loader: DataLoader,
    seed: int,
    epoch: int,
    rank: int,
    micro_batches: int = 0,
    generators_go_on: bool = False,
) -> None:
    """Sets everything random in an epoch as a function of (seed, epoch, rank) alone.

    Order, augmentation, mixup and dropout are then the same in a resumed run as in another.

    Args:
        loader: a training loader from `build_loaders`.
        seed: the config's SEED.
        epoch: counted from 0.
        rank: this process's global rank.
        micro_batches: how many were done before, and are left out.
        generators_go_on: whether the global generators are as they were after these, and stay so.
    """
    if not generators_go_on:
        place = [abs(seed), epoch, rank, *([micro_batches] if micro_batches else [])]
        seed_everything(int(np.random.SeedSequence(place).generate_state(1)[0]))
    assert isinstance(loader.sampler, TrainSampler)
    assert loader.batch_size is not None
    loader.sampler.start(epoch, micro_batches * loader.batch_size)


class _Images(ImageFolder):
    """An image folder whose errors name the file."""

    def __getitem__(self, index: int) -> Any:
        path = self.samples[index][0]
        try:
            if not os.path.isfile(path) and os.path.exists(path):  # a pipe would be waited for
                raise OSError('it is no regular file')
            return super().__getitem__(index)
        except Exception as error:
            reason = f'{type(error).__name__}: {error}'
            raise DataError(f'{path} cannot be used as an image: {reason}') from error


def _loader(config: CfgNode, images: Any, sampler: Sampler, **settings: Any) -> DataLoader:
    return Loader(
        images,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=sampler,
        num_workers=config.DATA.NUM_WORKERS,
        limit=config.COMM.TIMEOUT,
        begin_within=config.DATA.WORKER_TIMEOUT,
        generator=torch.Generator(),  # else each epoch draws from the global one
        pin_memory=bool(config.DATA.PIN_MEMORY and torch.cuda.is_available()),
        **settings,
    )


def _train_loader(config: CfgNode, dataset: ImageFolder, rank: int, world_size: int) -> DataLoader:
    sampler = TrainSampler(len(dataset), world_size, rank, config.SEED)
    loader = _loader(config, SeededImages(dataset), sampler, drop_last=True)
    if len(loader) == 0:
        raise ConfigError(
            f'{dataset.root} holds {len(dataset)} images, fewer than one batch on every rank: '
            f'{world_size} ranks x DATA.BATCH_SIZE {config.DATA.BATCH_SIZE}'
        )
    return loader


def _open_folder(config: CfgNode, split: str) -> ImageFolder:
    root = Path(config.DATA.DATA_PATH) / split
    if not config.DATA.DATA_PATH or not os.path.isdir(root):
        raise ConfigError(
            f'DATA.DATA_PATH {config.DATA.DATA_PATH!r}: there is no folder {root}. It must hold '
            f'train/<class>/*.png and val/<class>/*.png (or .jpeg ...); '
            f'`internvl-ds digits DIR` writes a small data set of that form'
        )
    try:
        dataset = _Images(str(root), build_transform(config, training=split == 'train'))
    except OSError as error:  # no class folders, or some of them without an image; no rights
        raise ConfigError(f'{root}: {error}') from error
    wanted, found = config.MODEL.NUM_CLASSES, len(dataset.classes)
    if split == 'val' and evaluates_22k_as_1k(config, found):
        wanted = CLASSES_1K
    if found != wanted:
        raise ConfigError(
            f'{root} has {found} classes, and the model is to tell {wanted} apart '
            f'(MODEL.NUM_CLASSES {config.MODEL.NUM_CLASSES})'
        )
    return dataset


def evaluates_22k_as_1k(config: CfgNode, val_classes: int) -> bool:
    """Whether an ImageNet-22K head is measured on ImageNet-1K classes.

    So EVAL_22K_TO_1K says, or DATA.DATASET 'imagenet22K' with a val folder of 1000 classes.
    """
    if config.MODEL.NUM_CLASSES != CLASSES_22K:
        return False
    of_22k = config.DATA.DATASET == 'imagenet22K' and val_classes == CLASSES_1K
    return bool(config.EVAL_22K_TO_1K or of_22k)


def _check_same_classes(config: CfgNode, train_set: ImageFolder, val_set: ImageFolder) -> None:
    if evaluates_22k_as_1k(config, len(val_set.classes)) or train_set.classes == val_set.classes:
        return
    ours, theirs = next(
        (a, b) for a, b in zip(train_set.classes, val_set.classes, strict=True) if a != b
    )
    raise ConfigError(
        f'{train_set.root} and {val_set.root} do not hold the same classes: where the first has '
        f'{ours!r}, the second has {theirs!r}'
    )


def _refuse_unsupported(config: CfgNode) -> None:
    data = config.DATA
    # 'part' is the original's default and means nothing outside zip mode.
    harmless = {'ZIP_MODE': (False,), 'CACHE_MODE': ('no', 'part'), 'IMG_ON_MEMORY': (False,)}
    for key, values in harmless.items():
        if (value := data[key]) not in values:
            said = f'DATA.{key} {value!r}'
            raise ConfigError(f'{said} is not supported: use an image folder, unpacked')
    if data.DATASET not in ('imagenet', 'imagenet22K'):
        raise ConfigError(
            f"DATA.DATASET {data.DATASET!r} is not supported: use 'imagenet' (any image folder "
            f"with train/ and val/) or 'imagenet22K'"
        )
