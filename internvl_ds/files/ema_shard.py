"""The file of a sharded average that one rank writes: its name, tensors and header."""

from __future__ import annotations

from typing import NamedTuple

import torch


class EmaFile(NamedTuple):
    """The tensors of an average that one rank writes.

    Attributes:
        name: of the file.
        tensors: name -> values.
        metadata: for the file's header.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] | None


def shard_name(rank: int) -> str:
    """The name of one rank's part of a sharded average."""
    return f'ema_rank_{rank}.safetensors'
