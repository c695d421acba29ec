"""The DeepSpeed CheckpointEngine of this package: how shards are written and read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.checkpoint.copying.copies import Memory, require_unwritten
from internvl_ds.checkpoint.copying.snapshot import Snapshot, tensor_bytes
from internvl_ds.checkpoint.formats.shard_files import read_shard
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.frozen import frozen_file
from internvl_ds.checkpoint.frozen.frozen_file import FrozenFile
from internvl_ds.checkpoint.frozen.omitting import Compared, Omitting
from internvl_ds.checkpoint.frozen.sharing import Seen, Sharing
from internvl_ds.checkpoint.proof import Wanted
from internvl_ds.checkpoint.tag.manifest import FileEntry, Identity
from internvl_ds.checkpoint.tag.pace import Pace, paced
from internvl_ds.checkpoint.tag.unchanged import Unchanged, write_anew
from internvl_ds.errors import CheckpointError


class ShardWriter(CheckpointEngine):
    """Writes, flushes and hashes this rank's files of a save, after DeepSpeed has collected them.

    ``engine.save_checkpoint`` meets in barriers, whose time limit a disk may exceed: it only
    collects, and `finish` writes. An exception in between would leave the others waiting, and is
    kept in ``error``. Outside of a save of this package the engine writes as DeepSpeed does.

    Attributes:
        identity: what every file of this save says of itself.
        entries: path -> size and digest, of the files of this save.
        error: the first failure of this save.
        last_size: bytes that this rank wrote in its last whole save; None before one.
        apart: how this save keeps frozen parameters apart; None where each tag holds them.
        wanted: what the files of each save must hold; None before one.
        seen, compared: what it may trust of earlier saves.
        pace: the rate of the writes of a background save.
        unchanged: links what is as the save before wrote it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = 'internvl_ds'
        self.identity = Identity('', '', 0)
        self.entries: dict[Path, FileEntry] = {}
        self.error: Exception | None = None
        self.last_size: int | None = None
        self.apart: Sharing | Omitting | None = None
        self.wanted: Wanted | None = None
        self.seen: Seen = set()
        self.compared: Compared = {}
        self.pace = Pace(0)
        self.unchanged = Unchanged()
        self._collects = self._in_background = False
        self._files: list[tuple[Path, Any]] = []
        self._first: list[tuple[Path, Any]] = []  # with originals, which wait to change
        self._tasks: list[Callable[[], None]] = []
        self._snapshot = Snapshot()
        self._written = threading.Event()  # what stands in no copy
        self._patience = 0.0
        self._contents: dict[Path, Any] = {}

    def begin(
        self,
        identity: Identity,
        *,
        updates: int,
        in_background: bool,
        apart: Sharing | Omitting | None = None,
        steady: Container[Memory] = (),
        limit: int = 0,
        rate: float = 0,
        patience: float = 1800.0,
    ) -> None:
        """Begins a save, which `finish` or `forget` ends; a background save collects copies.

        Args:
            identity: what every file says of itself.
            updates: that the engine has applied.
            in_background: whether `finish` runs while training goes on.
            apart: how frozen parameters are kept apart.
            steady, limit: see `Snapshot.begin`; who writes to that memory calls `finish_copy`
                first.
            rate: bytes a second that it writes, once all is copied; 0 for no limit.
            patience: seconds that `finish_copy` waits for what is not copied to be written.
        """
        self._patience, self.pace = patience, Pace(rate)
        self.identity, self.apart, self.error, self.entries = identity, apart, None, {}
        self.forget()
        self.unchanged.begin(identity, updates)
        self._collects, self._in_background = True, in_background
        if in_background:
            self._snapshot.begin(steady, limit)
            self._written.clear()
        else:
            self._snapshot = Snapshot()  # lets go of its memory

    def forget(self) -> None:
        """Ends a save without writing."""
        self._collects, self._files, self._first, self._tasks = False, [], [], []
        self._snapshot.copies.drop()
        self._written.set()

    def finish_copy(self) -> None:
        """Returns when the state of a background save is copied; makes what is left of the copies.

        Called before anything writes to that state. At once where there is nothing to copy.

        Raises:
            CheckpointError: when what is not copied was not written in time.
        """
        self._snapshot.copies.finish()
        if self._snapshot.originals and not self._written.wait(self._patience):
            raise CheckpointError(
                f'{self.identity.tag}: what exceeds CHECKPOINT.ASYNC_MEMORY was not written after '
                f'{self._patience:g} s (CHECKPOINT.IO_TIMEOUT), and must not change before'
            )

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing to do in a save of this package: rank 0 has made the staging directory."""
        if not self._collects:
            super().makedirs(path, exist_ok)

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to do: the caller has made the staging directory."""

    def save(self, state_dict: Any, path: str | Path) -> None:
        """Collects one file (what torch.save takes, or an `EmaFile`); a failure is kept."""
        if not self._collects:
            self._write(state_dict, Path(path))
            return
        try:
            parts = [(Path(path), state_dict)]
            if self.apart is not None:
                parts = self.apart.parts(state_dict, Path(path))
            for place, value in parts:
                # An EmaFile is a tuple of a name, tensors and metadata: it is copied as one.
                originals = len(self._snapshot.originals)
                kept = self._snapshot.copy(value) if self._in_background else value
                self._files.append((place, kept))
                if len(self._snapshot.originals) > originals:
                    self._first.append(self._files.pop())
        except Exception as error:
            self.error = self.error or error

    def seal(self) -> None:
        """Ends the collecting, on the thread that trains."""
        self._snapshot.copies.seal()

    def finish(self) -> None:
        """Writes what was collected; a failure is kept in ``error``."""
        try:
            self._write_first()
            with paced(self.pace):
                while self._files and self.error is None:
                    path, value = self._files.pop(0)
                    self._write(value, path)
                    del value  # of the state that was made for the file nothing is kept
            while self._tasks and self.error is None:
                self._tasks.pop(0)()
        except Exception as error:
            self.error = error
        self.forget()

    def _write_first(self) -> None:
        """Copies, and writes what is too much to copy; then training may write to all of it."""
        snapshot = self._snapshot
        snapshot.copies.finish()
        if snapshot.copies.error is not None:
            raise snapshot.copies.error
        while self._first and self.error is None:
            path, value = self._first.pop(0)
            self._write(value, path)
        require_unwritten(snapshot.originals)
        self._written.set()

    def defer(self, work: Callable[[], None]) -> None:
        """Adds an action to `finish`, after the files."""
        self._tasks.append(work)

    def _write(self, value: Any, path: Path) -> None:
        try:
            if isinstance(value, FrozenFile):
                frozen_file.write(value, path)
            else:
                self.entries[path] = self._write_file(value, path)
        except Exception as error:
            raise CheckpointError(f'{error}; the file needs {tensor_bytes(value)} bytes') from error

    def _write_file(self, value: Any, path: Path) -> FileEntry:
        if self._collects:
            return self.unchanged.write(value, path)
        return write_anew(value, path, self.identity)  # a script's own call of DeepSpeed

    def open(self, path: Path, shards: TagShards) -> None:
        """Reads one shard now, once for all loads until `close`; see `ShardFiles.read`."""
        self._contents[path] = shards.read(path)

    def load(self, path: str | Path, map_location: Any = None) -> Any:
        """Reads one shard as data, mapped into memory; refuses anything but data."""
        self.finish_copy()  # what is read is written over the state
        content = self._contents.get(Path(path))
        if content is None:  # a script calls DeepSpeed's own load
            content = frozen_file.joined(Path(path).parent, Path(path), read_shard(path, mmap=True))
        return content

    def close(self) -> None:
        """Closes the opened files."""
        self._contents = {}

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """The caller commits, when every rank has reported."""
        return True


def install_writer(engine: DeepSpeedEngine) -> ShardWriter:
    """Makes ``engine`` save and load through a `ShardWriter`, and returns it."""
    if not isinstance(engine.checkpoint_engine, ShardWriter):
        engine.checkpoint_engine = ShardWriter()
    return engine.checkpoint_engine
