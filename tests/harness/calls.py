"""What workers do around a call: note its error, make it on rank 0 alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from internvl_ds.dist.rendezvous import rank


def message_of(action: Callable[[], Any]) -> str:
    """The type and text of the error that ``action`` raises; 'no error' when it raises none."""
    try:
        action()
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    return 'no error'


def on_rank_0(action: Callable[[], Any]) -> None:
    """Runs ``action`` on rank 0 while the others wait."""
    torch.distributed.barrier()
    if rank() == 0:
        action()
    torch.distributed.barrier()
