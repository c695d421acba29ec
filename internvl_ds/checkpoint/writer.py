"""The DeepSpeed CheckpointEngine of this package: how shards are written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.checkpoint.ema_files import EmaFile, with_identity
from internvl_ds.checkpoint.hashing import save_safetensors, save_tensors
from internvl_ds.checkpoint.manifest import FileEntry, Identity
from internvl_ds.checkpoint.shards import TagShards, read_shard
from internvl_ds.checkpoint.snapshot import Snapshot, tensor_bytes
from internvl_ds.errors import CheckpointError


class ShardWriter(CheckpointEngine):
    """Writes this rank's files of a save, flushed and hashed: at once, or from a copy later.

    ``engine.save_checkpoint`` meets in barriers after each rank has written: an exception in
    between would leave the others waiting. ``error`` keeps it instead, for the caller to raise
    once all ranks are through.

    Attributes:
        identity: what every file of this save says of itself.
        written: path -> size and digest, of the files of this save.
        error: the first failure of this save.
        makes_directories: whether DeepSpeed's saves make the directories that they go to. Not a
            save of ours: rank 0 has made them, and a host that does not see OUTPUT is to say so.
        last_size: bytes that this rank wrote in its last whole save; None before one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = 'internvl_ds'
        self.identity = Identity('', '', 0)
        self.written: dict[Path, FileEntry] = {}
        self.error: Exception | None = None
        self.makes_directories = True
        self.last_size: int | None = None
        self._in_background = False
        self._copies: list[tuple[Path, Any]] = []
        self._snapshot = Snapshot()
        self._opened: dict[Path, Any] = {}

    def begin(self, identity: Identity, *, in_background: bool) -> None:
        """Begins a save; with ``in_background``, files are copied now and written by `finish`.

        Args:
            identity: goes into every file.
            in_background: see above.
        """
        self.identity = identity
        self.error = None
        self.written = {}
        self._copies = []
        self._in_background = in_background
        if in_background:
            self._snapshot.begin()
        else:
            self._snapshot = Snapshot()  # lets go of its memory

    def makedirs(self, path: str | Path, exist_ok: bool = False) -> None:
        """Makes a directory; see ``makes_directories``."""
        if self.makes_directories:
            super().makedirs(path, exist_ok=exist_ok)

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to do: the caller has made the staging directory."""

    def save(self, state_dict: Any, path: str | Path) -> None:
        """Writes or copies one file; a failure is kept in ``error``.

        Args:
            state_dict: what torch.save is to write, or an `EmaFile`.
            path: where to.
        """
        try:
            if self._in_background:
                # An EmaFile is a tuple of a name, tensors and metadata: it is copied as one.
                self._copies.append((Path(path), self._snapshot.copy(state_dict)))
            else:
                self._write(state_dict, Path(path))
        except Exception as error:
            self.error = self.error or error

    def finish(self) -> None:
        """Writes what `save` copied; a failure is kept in ``error``."""
        try:
            while self._copies and self.error is None:
                path, copied = self._copies.pop(0)
                self._write(copied, path)
        except Exception as error:
            self.error = error
        self._copies = []

    def _write(self, value: Any, path: Path) -> None:
        try:
            if isinstance(value, EmaFile):
                metadata = with_identity(value.metadata, self.identity)
                self.written[path] = save_safetensors(value.tensors, path, metadata)
            else:
                own = {**value, Identity.KEY: self.identity.to_dict()}
                self.written[path] = save_tensors(own, path)
        except Exception as error:
            raise CheckpointError(f'{error}; the file needs {tensor_bytes(value)} bytes') from error

    def open(self, path: Path, shards: TagShards) -> None:
        """Reads one shard now for the loads until `close`, to see whether it can be read.

        DeepSpeed asks for the model states twice; the pickle in them is read once.

        Raises:
            CheckpointError: when it cannot, or is no data.
        """
        self._opened[path] = shards.read(path)

    def load(self, path: str | Path, map_location: Any = None) -> Any:
        """Reads one shard as data, mapped into memory; what is no data is refused."""
        opened = self._opened.get(Path(path))
        return read_shard(path, mmap=True) if opened is None else opened

    def close(self) -> None:
        """Lets go of what was opened."""
        self._opened = {}

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """The caller commits, when every rank has reported."""
        return True


def install_writer(engine: DeepSpeedEngine) -> ShardWriter:
    """Makes ``engine`` save and load through a `ShardWriter`, and returns it."""
    if not isinstance(engine.checkpoint_engine, ShardWriter):
        writer = ShardWriter()
        engine.checkpoint_engine = writer
        copy_scripts = engine._copy_recovery_script

        def copy_scripts_or_keep_error(save_path: str) -> None:
            # On rank 0 only, and before a barrier: see ShardWriter.
            try:
                copy_scripts(save_path)
            except OSError as error:
                writer.error = writer.error or error

        engine._copy_recovery_script = copy_scripts_or_keep_error
    return engine.checkpoint_engine
