"""One tag to upload, as one rank sees it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from internvl_ds.checkpoint.mirror.places import Place
from internvl_ds.checkpoint.mirror.store import Source, Store
from internvl_ds.checkpoint.tag.discovery import read_manifest
from internvl_ds.checkpoint.tag.manifest import FILE_NAME, FileEntry, Manifest
from internvl_ds.checkpoint.tag.places import place_of
from internvl_ds.checkpoint.tag.retention import EpochTag, Policy
from internvl_ds.checkpoint.tag.verify import share_of
from internvl_ds.errors import CheckpointError
from internvl_ds.files.reading import JSON_BYTES, open_data, read_bytes

_UPLOADED = 'uploaded-{}'


class Gone(Exception):
    """The tag was pruned or replaced before it was uploaded."""


@dataclass
class Job:
    """A committed tag that is to be uploaded.

    Attributes:
        output: where it lies.
        place: its save.
        policies: retention; None for a tag saved as best.
        failures: attempts that failed since the last save.
        is_told: whether a warning has said so.
        sent: the names that this rank has uploaded.
    """

    output: Path
    place: Place
    policies: Sequence[Policy] | None
    failures: int = 0
    is_told: bool = False
    sent: set[str] = field(default_factory=set)

    @property
    def path(self) -> Path:
        """The tag in OUTPUT."""
        return self.output / self.place.tag

    def manifest(self) -> Manifest:
        """The tag's. Raises Gone where the tag is not of this save any more."""
        try:
            manifest = read_manifest(self.path)
        except CheckpointError:  # replaced this moment
            manifest = None
        if manifest is None or manifest.header.save != self.place.save:
            raise Gone
        return manifest

    def upload(self, store: Store, rank: int, ranks: int) -> bytes:
        """Uploads what this rank has not yet; rank 0 the manifest first. Returns its bytes.

        Raises:
            Gone: when the tag was removed meanwhile.
            Exception: whatever the mirror raises.
        """
        manifest = self.manifest()
        try:
            text = read_bytes(self.path / FILE_NAME, JSON_BYTES)
        except FileNotFoundError as error:
            raise Gone from error
        if rank == 0:
            self._put(store, FILE_NAME, io.BytesIO(text), len(text))
        for name in share_of(manifest.files, rank, ranks):
            if name not in self.sent:
                self._put_file(store, name, manifest.files[name])
        self._put(store, _UPLOADED.format(rank), io.BytesIO(b'\n'), 1)
        return text

    def missing(self, store: Store, ranks: int) -> list[str]:
        """What ranks that are not done have yet to write; Gone as `manifest`."""
        self.manifest()
        there = set(store.names(self.place.name))
        return [name for name in map(_UPLOADED.format, range(ranks)) if name not in there]

    def _put_file(self, store: Store, name: str, entry: FileEntry) -> None:
        path = place_of(self.path, name)
        try:
            file = open_data(path)
        except FileNotFoundError as error:
            self.manifest()
            raise CheckpointError(f'{path}: is missing') from error
        with file:
            hashed = _Hashed(file)
            self._put(store, name, hashed, entry.size)
        if hashed.entry() != entry:
            self.sent.discard(name)
            raise CheckpointError(f'{path}: has changed since it was saved')

    def _put(self, store: Store, name: str, source: Source, size: int) -> None:
        if name not in self.sent:
            store.put(f'{self.place.name}/{name}', source, size)
            self.sent.add(name)


@dataclass(frozen=True)
class KeepUploading:
    """Keeps the tags of these names, which ranks upload now."""

    names: frozenset[str]

    def keeps(self, tags: Sequence[EpochTag]) -> set[str]:
        return {tag.name for tag in tags if tag.name in self.names}


class _Hashed:
    """A file that is hashed as it is read."""

    def __init__(self, source: Source) -> None:
        self._source, self._hash, self._size = source, xxhash.xxh3_128(), 0

    def read(self, size: int, /) -> bytes:
        data = self._source.read(size)
        self._hash.update(data)
        self._size += len(data)
        return data

    def entry(self) -> FileEntry:
        """Of what was read until now."""
        return FileEntry(self._size, self._hash.hexdigest())
