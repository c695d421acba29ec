"""Tags made without an engine, for tests of what reads and keeps directories of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from internvl_ds.checkpoint.formats.state_json import state_text
from internvl_ds.checkpoint.tag import commit
from internvl_ds.checkpoint.tag.hashing import write_hashed, write_safetensors, write_tensors
from internvl_ds.checkpoint.tag.manifest import STATE_FILE, FileEntry, Header, Manifest, tag_name

SHARD = 'mp_rank_00_model_states.pt'


def make_header(tag: str, epoch: int | None, sequence: int = 1, **more: Any) -> Header:
    """A manifest's header in which only what a test is about has to be named."""
    values: dict[str, Any] = {
        'max_accuracy': 0.0,
        'saved_at': '2024-01-01T00:00:00+00:00',
        'zero_stage': 1,
        'world_size': 1,
        'precision': 'fp32',
        'global_steps': 40,
        'size': 0,
    }
    return Header(tag=tag, epoch=epoch, sequence=sequence, **{**values, **more})


def stage_tag(
    output: Path, tag: str, content: str = 'weights'
) -> tuple[commit.Staging, dict[str, FileEntry]]:
    """Begins a save and writes its one shard."""
    staging = commit.begin(output, tag)
    entry = write_hashed(staging.path / SHARD, lambda file: file.write(content.encode()))
    return staging, {SHARD: entry}


def save_tag(
    output: Path,
    epoch: int,
    best: str | None = None,
    content: str = 'weights',
    max_accuracy: float = 0.0,
    step: int | None = None,
    state: dict[str, Any] | None = None,
) -> Path:
    """Saves a tag of one shard the way `save_checkpoint` does, ``latest`` included.

    With ``state`` it has a state.json of that content.
    """
    tag = tag_name(epoch, best, step)
    staging, files = stage_tag(output, tag, content)
    if state is not None:
        text = state_text(state).encode()
        files[STATE_FILE] = write_hashed(staging.path / STATE_FILE, lambda file: file.write(text))
    header = make_header(
        tag, epoch, commit.next_sequence(output), max_accuracy=max_accuracy, step=step
    )
    return commit.commit(staging, Manifest(header, files), latest=best is None)


def save_tensors(value: Any, path: Path) -> FileEntry:
    """A file of torch.save, as a save writes it."""
    return write_hashed(path, functools.partial(write_tensors, value))


def save_safetensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> FileEntry:
    """A .safetensors file, as a save writes it."""
    return write_hashed(path, functools.partial(write_safetensors, tensors, metadata))


def hidden(output: Path) -> list[str]:
    """The names in a directory that begin with a dot."""
    return sorted(path.name for path in output.iterdir() if path.name.startswith('.'))
