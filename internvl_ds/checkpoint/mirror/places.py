"""The tags of a mirror: their names there, which are whole, and retention. Knows no ranks.

    MIRROR/
      00000012-ckpt_epoch_7-0123456789abcdef/          number of the save, tag, id of the save
        manifest.json                                  written first
        ...                                            what the manifest lists
        uploaded-0, uploaded-1, ...                    written by each rank after its files
      00000012-ckpt_epoch_7-0123456789abcdef.complete  written last: the digest of manifest.json

What has no ``.complete`` is no tag. It goes first when a tag is removed.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import xxhash

from internvl_ds.checkpoint.mirror.store import PART, Store
from internvl_ds.checkpoint.tag.manifest import (
    FILE_NAME,
    HEADER_BYTES,
    Header,
    Manifest,
    epoch_of,
    parse_header,
    parse_manifest,
    step_of,
)
from internvl_ds.checkpoint.tag.retention import EpochTag, Policy, tags_to_prune
from internvl_ds.checkpoint.tag.trash import MARK
from internvl_ds.errors import CheckpointError
from internvl_ds.files.reading import JSON_BYTES

logger = logging.getLogger(__name__)

_COMPLETE = '.complete'
_NAME = re.compile(r'(\d{8,18})-(ckpt_epoch_\w[\w.-]{0,200})-([0-9a-f]{16})', re.ASCII)


class Place(NamedTuple):
    """A save in a mirror; compares from the oldest to the newest.

    Attributes:
        sequence: `Header.sequence`.
        tag: the directory's name in OUTPUT.
        save: `Header.save`.
    """

    sequence: int
    tag: str
    save: str

    @property
    def name(self) -> str:
        """Of the directory in the mirror."""
        return f'{self.sequence:08d}-{self.tag}-{self.save}'

    @property
    def order(self) -> tuple[bool, int]:
        """What auto resume compares: an epoch or step tag goes before one saved as best."""
        return epoch_of(self.tag) is not None, self.sequence


def place_of_name(name: str) -> Place | None:
    """Reverses `Place.name`; None for any other name."""
    match = _NAME.fullmatch(name)
    place = Place(int(match[1]), match[2], match[3]) if match else None
    return place if place and place.name == name else None


def whole_places(names: Iterable[str]) -> list[Place]:
    """The complete tags among the names in a mirror, the oldest first."""
    stems = (name.removesuffix(_COMPLETE) for name in names if name.endswith(_COMPLETE))
    return sorted(place for stem in stems if (place := place_of_name(stem)))


def mark_complete(store: Store, place: Place, manifest: bytes) -> None:
    """Makes a tag count, whose files are all there."""
    text = _digest(manifest)
    store.put(place.name + _COMPLETE, io.BytesIO(text), len(text))


def read_whole(store: Store, place: Place) -> Manifest:
    """The manifest of a complete tag.

    Raises:
        CheckpointError: when it is not what was uploaded, or lists what no tag has.
    """
    where = f'{store.address}/{place.name}/{FILE_NAME}'
    data = store.read(f'{place.name}/{FILE_NAME}', JSON_BYTES + 1)
    if len(data) > JSON_BYTES or store.read(place.name + _COMPLETE, 64) != _digest(data):
        raise CheckpointError(f'{where}: is not what {_COMPLETE} was written for')
    manifest = parse_manifest(data.decode(errors='replace'), where)
    header = manifest.header
    if (header.sequence, header.tag, header.save) != place:
        raise CheckpointError(f'{where}: is of save {header.save} of {header.tag}')
    if strange := {FILE_NAME, MARK} & manifest.files.keys():
        raise CheckpointError(f'{where}: lists {min(strange)}, which is no file of a tag')
    return manifest


class Retention:
    """Removes tags from a mirror; remembers what it has read of those that stay."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._headers: dict[Place, Header | None] = {}

    def prune(self, policies: Sequence[Policy] | None, pending: Iterable[Place]) -> int:
        """Removes what no policy keeps, older saves of a tag, and parts of dead uploads.

        Args:
            policies: of epoch and step tags; None to leave those.
            pending: uploads that are not complete and go on.

        Returns:
            The highest number of a save that was found; -1 for none.
        """
        names = self._store.names()
        places = whole_places(names)
        newest = {place.tag: place for place in places}
        victims = [place for place in places if newest[place.tag] != place]
        if policies is not None:
            counted = [place for place in newest.values() if place.order[0]]
            gone = set(tags_to_prune(map(self._entry, counted), policies))
            victims += [place for place in counted if place.tag in gone]
        for place in victims:
            self._store.remove(place.name + _COMPLETE)
            self._headers.pop(place, None)
        stay = {place.name for place in {*places, *pending} - {*victims}}
        for name in names:
            stem = name.removesuffix(PART).removesuffix(_COMPLETE)
            if place_of_name(stem) and stem not in stay:
                self._store.remove(name)
                if stem == name:
                    logger.info('%s/%s: removed', self._store.address, name)
        return max((place.sequence for place in places), default=-1)

    def _entry(self, place: Place) -> EpochTag:
        if place not in self._headers:
            name = f'{place.name}/{FILE_NAME}'
            try:
                front = self._store.read(name, HEADER_BYTES).decode(errors='replace')
                self._headers[place] = parse_header(front, name)
            except (CheckpointError, FileNotFoundError):
                self._headers[place] = None
        header, step = self._headers[place], step_of(place.tag)
        accuracy = header.max_accuracy if header else None
        updates = header.global_steps if header and step is not None else None
        epoch = epoch_of(place.tag) or 0
        return EpochTag(place.sequence, epoch, place.tag, accuracy, step, updates)


def _digest(manifest: bytes) -> bytes:
    return xxhash.xxh3_128(manifest).hexdigest().encode()
