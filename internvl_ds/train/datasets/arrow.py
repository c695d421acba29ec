"""Data sets of Hugging Face's ``datasets``: saved to a folder, or built from files or by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from internvl_ds.errors import ConfigError, few
from internvl_ds.files.reading import Unreadable, read_bytes
from internvl_ds.train.datasets.decode import IMAGE_BYTES
from internvl_ds.train.datasets.sources import Opened, encoded

_SPLITS = {'train': ('train',), 'val': ('validation', 'val', 'test')}


class Rows:
    """The images of a column, encoded as they were saved.

    The names, which the digest of the order is of, are the table's fingerprint and the row.
    """

    def __init__(self, table: Any, column: str, root: str) -> None:
        from datasets import Image

        self.root, self._column = root, column
        self.names = encoded([f'{table._fingerprint}/{row}' for row in range(len(table))])
        self._table = table.select_columns([column]).cast_column(column, Image(decode=False))

    def where(self, index: int) -> str:
        """The row of an image."""
        return f'{self.root}, row {index}'

    def size(self, index: int) -> int:
        """Bytes of an image."""
        return len(self.read(index))

    def read(self, index: int) -> bytes:
        """The bytes of an image; OSError or ValueError."""
        image = self._table[index][self._column]
        if image is None:
            raise Unreadable('the row has no image')
        return image['bytes'] or read_bytes(image['path'], IMAGE_BYTES)


def open_arrow(config: CfgNode, split: str) -> Opened:
    """Opens ``hfds`` (what DATA_PATH holds) or ``hfds/NAME`` (DATA_PATH is the cache, if set).

    Raises:
        ConfigError: where the package is missing, the data set or split does not exist, or it has
            no column of images and none of labels.
    """
    name, path = config.DATA.DATASET.partition('/')[2], config.DATA.DATA_PATH
    what = f'DATA.DATASET {config.DATA.DATASET!r} ({name or path})'
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f'{what}: {error}: pip install datasets') from error
    try:
        saved = not name and any(
            Path(path, f).is_file() for f in ('dataset_dict.json', 'state.json')
        )
        if saved:
            whole = datasets.load_from_disk(path)
        else:
            whole = datasets.load_dataset(name or path, cache_dir=(path or None) if name else None)
    except Exception as error:  # of any kind; its first line is what to say
        reason = next(iter(str(error).splitlines()), '')
        raise ConfigError(f'{what}: cannot be read: {type(error).__name__}: {reason}') from error
    splits = whole if isinstance(whole, dict) else {'train': whole}
    found = next((each for each in _SPLITS[split] if each in splits), None)
    if found is None:
        raise ConfigError(
            f'{what}: has no split {" or ".join(_SPLITS[split])}; it has {few(sorted(splits))}'
        )
    table = splits[found]
    image, label = _columns(table, f'{what}, split {found}', multi=config.DATA.MULTI_LABEL)
    feature = table.features[label]
    feature = getattr(feature, 'feature', feature)  # of each label in a list
    classes = list(getattr(feature, 'names', None) or [])
    labels = table.select_columns([label]).with_format('numpy')[:][label]
    flat = [each for row in labels for each in np.atleast_1d(row).tolist()]
    if not all(type(each) is int and each >= 0 for each in flat):
        bad = next(each for each in flat if type(each) is not int or each < 0)
        raise ConfigError(
            f'{what}, split {found}: the column {label} holds {bad!r}, and labels are numbers of 0 '
            f'and above (class_encode_column({label!r}) makes them of names)'
        )
    rows: Sequence[Any] = (
        [np.ravel(row).tolist() for row in labels] if config.DATA.MULTI_LABEL else flat
    )
    count = len(classes) or max(flat, default=0) + 1
    return Opened(Rows(table, image, f'{what}, split {found}'), rows, classes, count)


def _columns(table: Any, what: str, *, multi: bool) -> tuple[str, str]:
    """The names of the columns of images and labels."""
    from datasets import ClassLabel, Image

    images = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    image = 'image' if 'image' in images else images[0] if len(images) == 1 else None
    kinds = [name for name, feature in table.features.items() if isinstance(feature, ClassLabel)]
    named = [name for name in ('label', 'labels') if name in table.features]
    label = [*named, *(kinds if len(kinds) == 1 else [])]
    if image is None or not label:
        raise ConfigError(
            f'{what}: has the columns {few(list(table.features), 20)}; one of images (image) and '
            'one of labels (label) are due'
        )
    feature = table.features[label[0]]
    if hasattr(feature, 'feature') != multi:
        raise ConfigError(
            f'{what}: the column {label[0]} holds {"lists" if not multi else "single labels"}, and '
            f'DATA.MULTI_LABEL is {multi}'
        )
    return image, label[0]
