"""Files of a save whose bytes an earlier save of this process has written: linked, not written.

A run that saves its best epoch saves the same state twice, or three times. What is to be written is
compared with the earlier file itself, byte for byte, up to the first difference; no digest is
trusted, so a file that was damaged or changed since is written anew. A file says in itself which
save wrote it: a linked one names that save, and the manifest lists it (`Header.linked`).
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from internvl_ds.checkpoint.formats.ema_files import with_identity
from internvl_ds.checkpoint.tag.hashing import write_hashed, write_safetensors, write_tensors
from internvl_ds.checkpoint.tag.manifest import FileEntry, Identity
from internvl_ds.checkpoint.tag.shared import NO_LINK
from internvl_ds.files.ema_shard import EmaFile
from internvl_ds.files.reading import open_data

logger = logging.getLogger(__name__)

_PIECE = 1 << 20


class _Kept(NamedTuple):
    entry: FileEntry
    identity: Identity


class Unchanged:
    """The files that one rank's last save wrote or linked, and those of the save under way."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[Path, _Kept]] = {}
        self._now: dict[str, _Kept] = {}
        self._identity = Identity('', '', 0)
        self._updates, self._updates_before = 0, -1
        self._says_no_link = True

    def begin(self, identity: Identity, updates: int) -> None:
        """Begins a save; what was not `committed` is forgotten.

        Args:
            identity: what its new files say of themselves.
            updates: that were applied so far. Only with those of the save before files are compared
                with it: else a GPU's tensors would be copied for that in vain.
        """
        self._identity, self._now, self._updates = identity, {}, updates

    def write(self, value: Any, path: Path) -> FileEntry:
        """Links the file from the earlier tag, or writes it.

        Args:
            value: what torch.save takes, or an `EmaFile`.
            path: in the staging directory.

        Raises:
            OSError: when it can be neither linked nor written.
        """
        kept = self._link(value, path)
        if kept is None:
            kept = _Kept(write_anew(value, path, self._identity), self._identity)
        self._now[path.name] = kept
        return kept.entry

    def committed(self, tag: Path) -> None:
        """Ends a save that was published as ``tag``."""
        self._before = {name: (tag / name, kept) for name, kept in self._now.items()}
        self._updates_before = self._updates

    @property
    def linked(self) -> dict[str, str]:
        """Save -> tag, of the save under way's files that earlier ones wrote: `Header.linked`."""
        others = (k.identity for k in self._now.values() if k.identity != self._identity)
        return {identity.save: identity.tag for identity in others}

    def _link(self, value: Any, path: Path) -> _Kept | None:
        """Gives the earlier file this name too; None where it is not there or another."""
        if path.name not in self._before or self._updates != self._updates_before:
            return None
        place, kept = self._before[path.name]
        if place.parent.parent != path.parent.parent:
            return None  # two directories of tags are two copies, which somebody may count on
        try:
            with open_data(place) as file:
                if not _is_same(_writer(value, kept.identity), file, kept.entry.size):
                    return None
                os.link(place, path)
                if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                    return kept
        except FileNotFoundError:  # retention took it
            return None
        except (OSError, ValueError) as error:
            if getattr(error, 'errno', None) not in NO_LINK:
                logger.warning('%s: cannot be read any more, and is written anew: %s', place, error)
            elif self._says_no_link:
                self._says_no_link = False
                logger.info('%s: as it was, and written again: no hard link (%s)', place, error)
        return None


def write_anew(value: Any, path: Path, identity: Identity) -> FileEntry:
    """Writes and flushes a file under a name of its own: what else has the present one stays."""
    path.unlink(missing_ok=True)
    return write_hashed(path, _writer(value, identity))


def _writer(value: Any, identity: Identity) -> Callable[[IO[bytes]], None]:
    """Writes the file that says ``identity`` of itself."""
    if isinstance(value, EmaFile):
        metadata = with_identity(value.metadata, identity)
        return partial(write_safetensors, value.tensors, metadata)
    return partial(write_tensors, {**value, Identity.KEY: identity.to_dict()})


def _is_same(write: Callable[[IO[bytes]], None], file: IO[bytes], size: int) -> bool:
    """Whether ``write`` makes what is in ``file``, of ``size`` bytes; ends at a difference."""
    if os.fstat(file.fileno()).st_size != size:
        return False
    earlier = _Earlier(file.fileno())
    try:
        write(earlier)  # type: ignore[arg-type]
    except Exception:
        if earlier.error is not None:
            raise earlier.error from None
        return False  # at a difference; or it cannot be written either, which says so there
    return earlier.size == size


class _Earlier(io.RawIOBase):
    """A file that what is written to it is compared with; raises at the first difference.

    Attributes:
        size: bytes that were the same.
        error: of reading; torch.save makes other errors of those from here.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.size = 0
        self.error: OSError | None = None
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast('B')
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            if not self._has(piece):
                raise ValueError('is another')
            self.size += len(piece)
        return len(view)

    def _has(self, piece: memoryview) -> bool:
        try:
            return os.pread(self._descriptor, len(piece), self.size) == bytes(piece)
        except OSError as error:
            self.error = error
            return False
