"""Checks DATA.*, AUG.* and TEST.* against each other, and chooses the images kept in memory."""

from __future__ import annotations

import logging

import psutil
from yacs.config import CfgNode

from internvl_ds.config.choices import require_one_of
from internvl_ds.config.tree import get_option
from internvl_ds.errors import ConfigError
from internvl_ds.files.reading import Unreadable
from internvl_ds.train.datasets.imagenet import REAL, VARIANTS
from internvl_ds.train.datasets.sources import SOURCES, Memory, Source, sizes_of

_log = logging.getLogger(__name__)

_CHOICES: dict[str, tuple[str, ...]] = {
    'DATA.CACHE_MODE': ('no', 'part', 'full'),
    'DATA.ON_ERROR': ('stop', 'skip'),
    'DATA.INTERPOLATION': ('random', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'),
    'AUG.REMODE': ('const', 'rand', 'pixel'),
    'AUG.MIXUP_MODE': ('batch', 'pair', 'elem'),
}
_SHARES = ('DATA.MAX_SKIPPED', 'AUG.REPROB', 'AUG.HFLIP', 'AUG.MIXUP_PROB', 'AUG.MIXUP_SWITCH_PROB')
_LENGTHS = {'AUG.SCALE': 2, 'AUG.MEAN': 3, 'AUG.STD': 3, 'AUG.CUTMIX_MINMAX': 2}


def check_data(config: CfgNode) -> None:
    """Refuses invalid values of DATA.*, AUG.* and TEST.*, and invalid combinations.

    Raises:
        ConfigError: names the keys, both values, and what to set.
    """
    for key, known in _CHOICES.items():
        require_one_of(key, get_option(config, key), known)
    for key in _SHARES:
        if not 0 <= (value := get_option(config, key)) <= 1:
            raise ConfigError(f'{key} is {value}, and a probability or share is from 0 to 1')
    for key, length in _LENGTHS.items():
        value = get_option(config, key)
        if value is not None and not (
            isinstance(value, list | tuple)
            and len(value) == length
            and all(isinstance(number, int | float) for number in value)
        ):
            raise ConfigError(f'{key} is {value!r}, and takes {length} numbers')
    data = config.DATA
    _check_source(config)
    if data.EXIF_ROTATE not in (None, True, False):
        raise ConfigError(f'DATA.EXIF_ROTATE is {data.EXIF_ROTATE!r}; it can be True, False, None')
    if data.DATASET in VARIANTS:
        _check_variant(config)
    if not data.ZIP_MODE and data.CACHE_MODE == 'full':
        raise ConfigError(
            "DATA.CACHE_MODE 'full' keeps the images of zip files in memory, and DATA.ZIP_MODE is "
            'False: set it True, or DATA.IMG_ON_MEMORY True for an image folder'
        )
    if data.ZIP_MODE and data.IMG_ON_MEMORY and data.CACHE_MODE != 'part':
        raise ConfigError(
            f'DATA.IMG_ON_MEMORY True keeps a part of the images on each rank, and DATA.CACHE_MODE '
            f"is {data.CACHE_MODE!r}: set one of them otherwise ('part' agrees with it)"
        )


def _check_source(config: CfgNode) -> None:
    data = config.DATA
    kind, named, name = data.DATASET.partition('/')
    if named and kind in ('tfds', 'hfids', 'wds'):
        raise ConfigError(
            f"DATA.DATASET is {data.DATASET!r}, of timm's, which is not read here: 'wds' reads "
            'the shards in DATA.DATA_PATH, and a DATA.FACTORY whatever has a length and an order'
        )
    if not (kind == 'hfds' and name):
        known = ('imagenet', 'imagenet22K', REAL, *VARIANTS, 'folder', *SOURCES, 'hfds/NAME')
        require_one_of('DATA.DATASET', data.DATASET, known)
    what = f'DATA.FACTORY {data.FACTORY!r}' if data.FACTORY else f'DATA.DATASET {data.DATASET!r}'
    if data.FACTORY and data.DATASET not in ('imagenet', 'folder'):
        raise ConfigError(f'{what} takes the place of DATA.DATASET, which is {data.DATASET!r}')
    if data.ZIP_MODE and (data.FACTORY or kind in SOURCES):
        raise ConfigError(f'DATA.ZIP_MODE True reads class folders in zip files, and {what} is set')
    if data.FACTORY and data.IMG_ON_MEMORY:
        raise ConfigError(
            f'DATA.IMG_ON_MEMORY True keeps encoded files in memory, and {what} has its own: have '
            'it keep them'
        )
    if not data.MULTI_LABEL:
        return
    if not data.FACTORY and kind not in ('wds', 'csv', 'jsonl', 'hfds'):
        raise ConfigError(f'DATA.MULTI_LABEL True: {what} has one label an image')
    if (aug := config.AUG).MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX:
        raise ConfigError(
            f'DATA.MULTI_LABEL True: AUG.MIXUP {aug.MIXUP} / AUG.CUTMIX {aug.CUTMIX} mix images of '
            'one label: set both to 0'
        )


def reads_parts(config: CfgNode) -> bool:
    """Whether each rank trains on a part of the images that it keeps, the same in every epoch."""
    data = config.DATA
    return bool(data.IMG_ON_MEMORY or (data.ZIP_MODE and data.CACHE_MODE == 'part'))


def keep_in_memory(
    config: CfgNode, source: Source, split: str, rank: int, world_size: int
) -> Source:
    """Reads the images that this rank keeps: image i on rank i % world_size, or all.

    Returns:
        The source to read from; the given one where nothing is kept.

    Raises:
        ConfigError: when an image cannot be read, or all that is kept has no room in memory.
    """
    data, total = config.DATA, len(source.names)
    zipped = data.CACHE_MODE if data.ZIP_MODE else 'no'
    if split == 'val':  # a rank evaluates its share alone
        part, whole = zipped != 'no' and not config.TEST.SEQUENTIAL, zipped == 'full'
    else:
        part, whole = reads_parts(config), zipped == 'full'
    if not part and not whole:
        return source
    indices = range(rank, total, world_size) if part else range(total)
    skips = split == 'train' and data.ON_ERROR == 'skip'
    try:
        sizes = sizes_of(source, indices, skips=skips)
        if (size := sum(sizes)) > (free := psutil.virtual_memory().available):
            raise ConfigError(
                f'{source.root}: rank {rank} is to keep {len(indices)} images, '
                f'{size / 1e9:.1f} GB, and this host has {free / 1e9:.1f} GB of memory '
                "left: set DATA.IMG_ON_MEMORY False, and DATA.CACHE_MODE 'no'"
            )
        memory = Memory(source, indices, sizes, skips=skips)
    except Unreadable as error:
        raise ConfigError(
            f'an image cannot be read into memory: {error}; mend or remove it (DATA.ON_ERROR '
            "'skip' leaves such images out in training, never in evaluation)"
        ) from error
    _log.info('%s: rank %d keeps %d images, %.2f GB', split, rank, len(indices), size / 1e9)
    return memory


def _check_variant(config: CfgNode) -> None:
    data = config.DATA
    if not (config.EVAL_MODE or config.THROUGHPUT_MODE):
        raise ConfigError(
            f'DATA.DATASET {data.DATASET!r} has no training images: evaluate on it (--eval, '
            "EVAL_MODE True), and train on 'imagenet'"
        )
    if data.ZIP_MODE:
        raise ConfigError(
            f'DATA.ZIP_MODE True: DATA.DATASET {data.DATASET!r} is read from class folders; '
            'unpack it'
        )
