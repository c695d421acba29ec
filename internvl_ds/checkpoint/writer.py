"""The DeepSpeed CheckpointEngine of this package: how shards are written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.checkpoint.shards import read_shard


class ShardWriter(CheckpointEngine):
    """Writes shards, and keeps a failure until all ranks can hear of it.

    ``engine.save_checkpoint`` meets in barriers after each rank has written: an exception in
    between would leave the others waiting. ``error`` holds it instead, for the caller to raise
    once all ranks are through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = 'internvl_ds'
        self.error: Exception | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begins a save: forgets the last one's failure."""
        self.error = None

    def save(self, state_dict: Any, path: str) -> None:
        """Writes one shard; a failure is kept in ``error``."""
        try:
            torch.save(state_dict, path)
        except Exception as error:
            self.error = self.error or error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads one shard as data; what is no data is refused."""
        return read_shard(Path(path))

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """The caller commits, when every rank has reported."""
        return True


def install_writer(engine: DeepSpeedEngine) -> ShardWriter:
    """Makes ``engine`` save and load through a `ShardWriter`, and returns it."""
    if not isinstance(engine.checkpoint_engine, ShardWriter):
        engine.checkpoint_engine = ShardWriter()
    return engine.checkpoint_engine
