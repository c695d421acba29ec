"""DATA.FACTORY: a data set of the user's own, of any kind that has a length and an order."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from yacs.config import CfgNode

from internvl_ds.config.factory import failed, load_factory
from internvl_ds.errors import ConfigError, DataError, brief
from internvl_ds.train.datasets.decode import as_rgb, decode
from internvl_ds.train.datasets.images import Images, hot, unusable
from internvl_ds.train.datasets.sources import encoded
from internvl_ds.train.datasets.transforms import Transform


class _Items:
    """What messages, and the digest of the order, need to know of a user's data set."""

    def __init__(self, root: str, names: Sequence[str]) -> None:
        self.root, self.names = root, encoded(names)

    def where(self, index: int) -> str:
        """The item, by its number and, where it has one, its name."""
        name = f' ({self.names[index].decode(errors="replace")})' if len(self.names) else ''
        return f'{self.root}, item {index}{name}'


class Made(Images):
    """The items of a user's data set, decoded and transformed where they are not yet."""

    def __init__(
        self,
        items: Any,
        source: _Items,
        transform: Transform,
        classes: Sequence[str],
        num_classes: int,
        config: CfgNode,
    ) -> None:
        super().__init__(
            source, [0] * len(items), transform, classes, num_classes,  # type: ignore[arg-type]
            upright=config.DATA.EXIF_ROTATE is not False,
        )  # fmt: skip
        self._items, self.multi_label = items, config.DATA.MULTI_LABEL
        self._shape = (3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)

    def _load(self, index: int) -> tuple[Any, Any]:
        where = self.source.where(index)
        try:
            item = self._items[index]
        except Exception as error:
            raise unusable(where, error) from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ConfigError(f'{where} is {_kind(item)}, and not an image and its label')
        image, label = item
        return self._image(image, where), self._label(label, where)

    def _image(self, image: Any, where: str) -> torch.Tensor:
        if isinstance(image, torch.Tensor):
            if tuple(image.shape) != self._shape or not image.is_floating_point():
                raise ConfigError(
                    f'{where} is {_kind(image)}; a tensor is taken as it is, and must be of floats '
                    f'and of the shape {self._shape} (DATA.IMG_SIZE)'
                )
            return image.detach()
        if not isinstance(image, Image.Image | bytes):
            raise ConfigError(
                f'{where} begins with {_kind(image)}, and not with a PIL image, the bytes of an '
                'image file or a tensor'
            )
        try:
            if isinstance(image, Image.Image):
                return self.transform(as_rgb(image))
            return self.transform(decode(image, upright=self.upright))
        except Exception as error:
            raise unusable(where, error) from error

    def _label(self, label: Any, where: str) -> Any:
        try:
            numbers = np.atleast_1d(np.asarray(label))
            whole = np.issubdtype(numbers.dtype, np.integer) or not numbers.size
            ours = np.ndim(label) == int(self.multi_label)
            if whole and ours and all(0 <= each < self.num_classes for each in numbers):
                return hot(numbers, self.num_classes) if self.multi_label else int(numbers[0])
        except (TypeError, ValueError, RuntimeError):  # numpy's, of ragged lists and the like
            pass
        due = 'a list of integers' if self.multi_label else 'an integer'
        raise ConfigError(
            f'{where} has the label {brief(label)}, and not {due} of 0 ... {self.num_classes - 1} '
            f'(MODEL.NUM_CLASSES; DATA.MULTI_LABEL {self.multi_label})'
        )


def open_factory(config: CfgNode, split: str, transform: Transform) -> Images:
    """Calls DATA.FACTORY with the config and the split, and checks what it returns.

    Raises:
        ConfigError: says what is wrong with the function or what it returned.
    """
    factory = config.DATA.FACTORY
    what = f'DATA.FACTORY {factory!r} ({split})'
    function = load_factory('DATA.FACTORY', factory)
    try:
        items = function(config, split)
    except ConfigError:
        raise
    except Exception as error:
        raise failed(what, error) from error
    if isinstance(items, IterableDataset) or not all(
        hasattr(items, name) for name in ('__len__', '__getitem__')
    ):
        raise ConfigError(
            f'{what} returned {_kind(items)}, which has no __len__ and __getitem__: the order of '
            'training, and the place in it to resume from, need both'
        )
    try:
        total = len(items)
    except Exception as error:
        raise failed(f'{what}: the length of {_kind(items)}', error) from error
    if not total:
        raise ConfigError(f'{what} returned {_kind(items)} without an item')
    classes = _texts(items, 'classes', what)
    count = config.MODEL.NUM_CLASSES or len(classes)
    if not count:
        raise ConfigError(
            f'{what}: MODEL.NUM_CLASSES is 0, and {_kind(items)} has no attribute classes to take '
            'the number from: give it one, or set the number'
        )
    if classes and len(classes) != count:
        raise ConfigError(
            f'{what} has {len(classes)} classes, and the model is to tell {count} apart '
            f'(MODEL.NUM_CLASSES {config.MODEL.NUM_CLASSES})'
        )
    names = _texts(items, 'names', what)
    if names and len(names) != total:
        raise ConfigError(f'{what} has {total} items and {len(names)} names')
    images = Made(items, _Items(what, names), transform, classes, count, config)
    with contextlib.suppress(DataError):  # a faulty image, which comes again where it is read
        images._load(0)
    return images


def _texts(items: Any, name: str, what: str) -> list[str]:
    """An attribute that is a sequence of texts; none where there is none."""
    texts = getattr(items, name, None)
    if texts is None:
        return []
    try:
        listed = list(texts)
        encoded(listed)
    except (TypeError, ValueError):  # no sequence, no texts, or of half a character
        listed = [None]
    if isinstance(texts, str) or not all(isinstance(each, str) for each in listed):
        raise ConfigError(f'{what}: its attribute {name} is {brief(texts)}, and no list of texts')
    return list(map(str, listed))


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f'a tensor of {value.dtype} and the shape {tuple(value.shape)}'
    if isinstance(value, tuple | list):
        return f'a {type(value).__name__} of {len(value)}'
    return f'a {type(value).__name__}'
