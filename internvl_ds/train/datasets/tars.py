"""Images in tar files, read at their places: class folders, and WebDataset's samples.

The headers are read once, before workers are forked. After that an image is a part of a file like
any other, so that both kinds have an order, and a position in it, as an image folder has.
"""

from __future__ import annotations

import itertools
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from internvl_ds.errors import ConfigError, few
from internvl_ds.files.reading import Unreadable, open_data, parse_json
from internvl_ds.train.datasets.decode import IMAGE_BYTES
from internvl_ds.train.datasets.sources import Opened, encoded
from internvl_ds.train.datasets.walk import is_image_name

_TAIL_BYTES = 1 << 16  # looked at behind the last entry
_LABEL_BYTES = 1 << 20  # of one sample's .cls or .json

_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A file inside a tar file: its name there, and its place, bytes."""

    name: str
    offset: int
    size: int


class TarParts:
    """Parts of tar files. A tar file is opened for each read: there may be thousands of them."""

    def __init__(
        self, root: Path, files: Sequence[Path], parts: Sequence[tuple[int, Part]]
    ) -> None:
        """Takes the images in their order.

        Args:
            root: where the files are, for messages.
            files: the tar files.
            parts: of each image, the number of its file, and its place there.
        """
        self.root = str(root)
        self.names = encoded([part.name for _, part in parts])
        self._files = [str(file) for file in files]
        rows = [(file, part.offset, part.size) for file, part in parts]
        self._rows = np.array(rows, dtype=np.int64).reshape(-1, 3)

    def where(self, index: int) -> str:
        """Tar file and entry of an image."""
        return f'{self._files[self._rows[index, 0]]}@/{os.fsdecode(self.names[index])}'

    def size(self, index: int) -> int:
        """Bytes of an image."""
        return int(self._rows[index, 2])

    def read(self, index: int) -> bytes:
        """The bytes of an image; OSError or ValueError."""
        file, offset, size = map(int, self._rows[index])
        if size > IMAGE_BYTES:
            raise Unreadable(f'has {size} bytes, and an image has {IMAGE_BYTES} at most')
        return _read_part(self._files[file], offset, size)


def open_tar(path: Path, split: str) -> Opened:
    """Opens ``split.tar``, or the tar files in the folder ``split``.

    An image's class is the last folder of its path; where it is in none, its tar file, in a folder
    of these or inside another (as ImageNet's own). A hidden folder is no class; the log names it.

    Raises:
        ConfigError: for missing or damaged files, and images without a class.
    """
    files, root = _tar_files(path, split, [f'{split}.tar'], [f'{split}/*.tar'])
    whole = root.is_file()
    found: list[tuple[str, int, Part]] = []
    hidden: set[str] = set()
    for number, file in enumerate(files):
        for part in read_headers(file):
            inside = part.name if whole else f'{file.stem}/{part.name}'
            inside = os.path.normpath(inside).removeprefix(f'{split}/')
            if not is_image_name(inside) or os.path.basename(inside).startswith('.'):
                continue
            label = os.path.basename(os.path.dirname(inside))
            if not label:
                raise ConfigError(f'{file}: {part.name} is in no folder, which would be its class')
            if label.startswith('.'):
                hidden.add(os.path.dirname(inside))
            else:
                found.append((label, number, part._replace(name=inside)))
    if hidden:
        _log.warning('%s: hidden folders are no classes: %s', root, few(sorted(hidden)))
    if not found:
        raise ConfigError(f'{root}: has no image in its tar files')
    found.sort(key=lambda each: (each[0], each[2].name))
    for (_, _, one), (_, number, other) in itertools.pairwise(found):
        if one.name == other.name:
            raise ConfigError(f'{files[number]}: has {other.name} twice')
    classes = sorted({label for label, _, _ in found})
    index = {name: label for label, name in enumerate(classes)}
    source = TarParts(root, files, [(number, part) for _, number, part in found])
    return Opened(source, [index[label] for label, _, _ in found], classes, len(classes))


def open_webdataset(path: Path, split: str) -> Opened:
    """Opens the shards ``split/*.tar``, or ``*split*.tar``, of WebDataset's form.

    A sample is the files of one name up to its first dot: one image, and its label as a number in
    ``.cls``, or as ``label`` in ``.json``.

    Raises:
        ConfigError: for missing or damaged shards, and samples without one image and one label.
    """
    files, root = _tar_files(path, split, [], [f'{split}/*.tar', f'*{split}*.tar'])
    parts: list[tuple[int, Part]] = []
    labels: list[Any] = []
    for number, file in enumerate(files):
        for key, sample in _samples(file):
            images = [ext for ext in sample if '.' not in ext and is_image_name(f'.{ext}')]
            if len(images) != 1:
                raise ConfigError(
                    f'{file}: the sample {key} has {len(images)} images among its files '
                    f'({few(sorted(sample))}), where one is due'
                )
            image = sample[images[0]]
            parts.append((number, image._replace(name=f'{file.name}/{image.name}')))
            labels.append(_label(file, key, sample))
    if not parts:
        raise ConfigError(f'{root}: has no sample in its shards')
    numbers = [each for label in labels for each in (label if isinstance(label, list) else [label])]
    return Opened(TarParts(root, files, parts), labels, [], max(numbers, default=0) + 1)


def read_headers(path: Path) -> Iterator[Part]:
    """The files in a tar file, and in those directly inside it.

    Raises:
        ConfigError: for a file that is no tar file, is damaged, or does not end as one.
    """
    try:
        with open_data(path) as file:
            yield from _headers(file, 0, nested=False)
    except (OSError, ValueError, tarfile.TarError, EOFError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f'{path}: cannot be read as a tar file: {error}') from error


def _headers(file: Any, start: int, *, nested: bool) -> Iterator[Part]:
    with tarfile.open(fileobj=file, mode='r:') as archive:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # a million of them would take a gigabyte
            if not entry.isreg() or entry.issparse():
                continue
            place = start + entry.offset_data
            if not nested and entry.name.endswith('.tar'):
                inner = archive.extractfile(entry)
                for part in _headers(inner, place, nested=True):
                    yield part._replace(name=f'{entry.name[:-4]}/{part.name}')
            else:
                yield Part(entry.name, place, entry.size)
        # tarfile takes a damaged header for the end, as it does a second tar file appended.
        file.seek(archive.offset)
        tail = file.read(_TAIL_BYTES)
        if len(tail) < tarfile.BLOCKSIZE or tail.strip(b'\0'):
            raise Unreadable(f'it is cut off or damaged at byte {start + archive.offset}')


def _tar_files(
    path: Path, split: str, files: Sequence[str], patterns: Iterable[str]
) -> tuple[list[Path], Path]:
    """The tar files of a split, and the place to name for them."""
    for name in files:
        if (path / name).is_file():
            return [path / name], path / name
    for pattern in patterns:
        if found := sorted(path.glob(pattern)):
            of_both = [p for p in found if 'train' in p.name and 'val' in p.name]
            if of_both and pattern.startswith('*'):
                raise ConfigError(
                    f'{of_both[0]}: is of train and of val by its name: put the tar files of each '
                    f'into a folder {path / "train"} and {path / "val"}'
                )
            return found, found[0].parent
    places = ' nor '.join(str(path / name) for name in [*files, *patterns])
    raise ConfigError(f'DATA.DATA_PATH {path}: there is no {places}')


def _samples(file: Path) -> Iterator[tuple[str, dict[str, Part]]]:
    """The samples of a shard: their parts by extension."""
    samples: dict[str, dict[str, Part]] = {}
    for part in read_headers(file):
        folder, name = os.path.split(part.name)
        base, dot, extension = name.partition('.')
        if not base or not dot:
            continue
        sample = samples.setdefault(os.path.join(folder, base), {})
        if sample.setdefault(extension.lower(), part) is not part:
            raise ConfigError(f'{file}: has {part.name} twice')
    yield from samples.items()


def _label(file: Path, key: str, sample: dict[str, Part]) -> Any:
    """The label of a sample: a number, or a list of numbers."""
    part = sample.get('cls') or sample.get('json')
    if part is None:
        raise ConfigError(f'{file}: the sample {key} has no label: no {key}.cls and no {key}.json')
    try:
        if part.size > _LABEL_BYTES:
            raise Unreadable(f'has {part.size} bytes')
        label = parse_json(_read_part(str(file), part.offset, part.size).decode())
        if 'cls' not in sample:
            label = label['label']
        labels = label if isinstance(label, list) else [label]
        if not all(type(each) is int and each >= 0 for each in labels):
            raise Unreadable('its label is no number of 0 and above')
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f'{file}: {part.name} has no label in it: {error}') from error
    return label


def _read_part(file: str, offset: int, size: int) -> bytes:
    with open_data(file) as opened:
        data = os.pread(opened.fileno(), size, offset)
    if len(data) != size:
        raise Unreadable('the tar file has become shorter')
    return data
