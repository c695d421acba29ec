"""Samplers and loaders: the same data in the same order, however often resumed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from timm.data import Mixup
from torch.utils.data import DataLoader, Sampler
from yacs.config import CfgNode

from internvl_ds.config.tree import set_options
from internvl_ds.engine.epochs import seed_everything, seed_of
from internvl_ds.errors import ConfigError
from internvl_ds.train.datasets.checks import check_data, keep_in_memory, reads_parts
from internvl_ds.train.datasets.images import Images
from internvl_ds.train.datasets.opening import differing, evaluates_22k_as_1k, open_split
from internvl_ds.train.datasets.skipping import Skipped
from internvl_ds.train.objective.class_weights import class_weights
from internvl_ds.train.sampler import SeededImages, TrainSampler
from internvl_ds.train.workers import Loader

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaders:
    """What a run reads.

    Attributes:
        train: yields (images, labels) of this rank; None in EVAL_MODE and THROUGHPUT_MODE.
        val: this rank's share, sampled by `EvalSampler`.
        mixup: to be applied to each training batch on the device; None where the config has none.
        classes: names of the labels 0, 1, ... that the model tells apart; none where an
            ImageNet-22K head is only measured on ImageNet-1K.
        weights: of the classes in the training loss, float32, (classes,); None: all the same.
        skipped: the faulty training images that others replace; None where they are errors.
    """

    train: DataLoader | None
    val: DataLoader
    mixup: Mixup | None
    classes: Sequence[str] = ()
    weights: torch.Tensor | None = None
    skipped: Skipped | None = None


def build_loaders(config: CfgNode, rank: int, world_size: int) -> Loaders:
    """Opens the images that DATA.* names, and makes this rank's loaders.

    MODEL.NUM_CLASSES 0 is replaced by the number of classes that they have.

    Raises:
        ConfigError: for a missing or empty folder, classes that do not fit MODEL.NUM_CLASSES or
            each other, fewer training images than one global batch, settings that contradict each
            other, and an odd batch with mixup.
    """
    check_data(config)
    val_set, train_set = _open_splits(config)
    train_loader, classes, weights, skipped = None, val_set.classes, None, None
    if evaluates_22k_as_1k(config, val_set.num_classes):
        classes = []
    if train_set is not None:
        _check_same_classes(config, train_set, val_set)
        classes, weights = train_set.classes, class_weights(config, train_set)
        if config.DATA.ON_ERROR == 'skip':
            skipped = train_set.skipped = Skipped(len(train_set), config.DATA.MAX_SKIPPED)
        train_loader = _train_loader(config, train_set, rank, world_size)
        val_set.source = keep_in_memory(config, val_set.source, 'val', rank, world_size)
    sampler = EvalSampler(len(val_set), world_size, rank, sequential=config.TEST.SEQUENTIAL)
    val_loader, mixup = _loader(config, val_set, sampler), build_mixup(config)
    return Loaders(train_loader, val_loader, mixup, classes, weights, skipped)


def _open_splits(config: CfgNode) -> tuple[Images, Images | None]:
    """The images to evaluate on, and those to train on, if the run trains.

    MODEL.NUM_CLASSES 0 becomes the number that the first of them has: in training, that of its
    images.
    """
    splits = ['val'] if config.EVAL_MODE or config.THROUGHPUT_MODE else ['val', 'train']
    if not config.MODEL.NUM_CLASSES:
        splits.reverse()
    opened: dict[str, Images] = {}
    for split in splits:
        opened[split] = open_split(config, split)
        if not config.MODEL.NUM_CLASSES:
            count = opened[split].num_classes
            _log.info('MODEL.NUM_CLASSES is %d, as %s has it', count, opened[split].root)
            set_options(config, {'MODEL.NUM_CLASSES': count})
    return opened['val'], opened.get('train')


def order_of(loader: DataLoader, seed: int) -> dict[str, Any]:
    """The values, beside the epoch, that determine the order of a training loader's images.

    The number of images, the seed, a digest of the files' names below their folder (none where a
    DATA.FACTORY gives no names), how many parts they are in where each rank keeps and reads one of
    its own (else None), and how often an image is repeated, where it is.
    """
    assert isinstance(loader.dataset, SeededImages)
    images, digest = loader.dataset.images, xxhash.xxh3_64()
    for name in images.source.names:
        digest.update(b'/' + name + b'\0')
    assert isinstance(loader.sampler, TrainSampler)
    repeats = loader.sampler.repeats
    return {
        'images': len(images),
        'SEED': abs(seed),
        'file names': digest.hexdigest(),
        'parts': loader.sampler.parts,
        **({'REPEATED_AUG': repeats} if repeats > 1 else {}),
    }


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
    indices = list(range(rank, total, world_size))
    length = -(-total // world_size)
    return indices + [0] * (length - len(indices)), len(indices)


class EvalSampler(Sampler[int]):
    """Yields a rank's share of a data set in order, padded as `shard_indices` says.

    Attributes:
        num_valid: how many of the yielded indices, from the first on, count.
    """

    def __init__(self, total: int, world_size: int, rank: int, *, sequential: bool = False) -> None:
        """Deals the images out.

        Args:
            total: images in the data set.
            world_size, rank: of the processes that share it.
            sequential: have every rank read all of them, in the batches of one process; those of
                rank 0 count.
        """
        self._indices, self.num_valid = shard_indices(total, world_size, rank)
        if sequential:
            self._indices, self.num_valid = list(range(total)), total if rank == 0 else 0

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


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
        seed_everything(seed_of(*place))
    assert isinstance(loader.sampler, TrainSampler)
    assert loader.batch_size is not None
    loader.sampler.start(epoch, micro_batches * loader.batch_size)


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


def _train_loader(config: CfgNode, dataset: Images, rank: int, world_size: int) -> DataLoader:
    parts = reads_parts(config)
    sampler = TrainSampler(
        len(dataset), world_size, rank, config.SEED, parts=parts, repeats=config.DATA.REPEATED_AUG
    )
    kept = bool(config.DATA.PERSISTENT_WORKERS and config.DATA.NUM_WORKERS)
    images = SeededImages(dataset)
    loader = _loader(config, images, sampler, drop_last=True, persistent_workers=kept)
    if len(loader) == 0:
        raise ConfigError(
            f'{dataset.root} holds {len(dataset)} images, fewer than one batch on every rank: '
            f'{world_size} ranks x DATA.BATCH_SIZE {config.DATA.BATCH_SIZE}'
        )
    dataset.source = keep_in_memory(config, dataset.source, 'train', rank, world_size)
    return loader


def _check_same_classes(config: CfgNode, train_set: Images, val_set: Images) -> None:
    if evaluates_22k_as_1k(config, val_set.num_classes) or train_set.classes == val_set.classes:
        return
    if not train_set.classes or not val_set.classes:  # of a list, which has labels alone
        return
    words = differing(train_set.root, train_set.classes, val_set.root, val_set.classes)
    raise ConfigError(
        f'{train_set.root} and {val_set.root} do not hold the same classes by label: '
        f'{words or "the same names, in another order"}'
    )
