"""Writing files that others read: aside, flushed to disk, and renamed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_text(path: Path, text: str) -> None:
    """Replaces ``path`` by ``text`` (UTF-8) so that a reader sees the old file or the new one."""
    aside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    with aside.open('w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_directory(path.parent)


def write_safetensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors of any device and layout, readable by whoever may read the directory."""
    # Clones, because safetensors refuses tensors that share memory.
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(plain, path, metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)  # save_file makes it private


def sync_directory(path: Path) -> None:
    """Makes renames and new names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
