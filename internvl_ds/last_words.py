"""What a rank says when an exception ends it: which rank, where, why, and who else is gone."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as torch_dist

from internvl_ds.errors import RankError

# The hook that speaks; those under it only print the traceback.
_outermost: Callable[..., None] | None = None


def speak_on_exceptions(
    rank: int,
    silent: Callable[[], str] | None = None,
    afterwards: Callable[[], None] | None = None,
) -> None:
    """Has an exception that ends this process be told in one line, after its traceback.

    To be called again once the process group is there: torch then puts a hook of its own around
    those before, which keeps what they print until they return.

    Args:
        rank: this process's.
        silent: tells of ranks that do not answer, or ''; asked where a collective failed.
        afterwards: called last.
    """
    global _outermost
    before = sys.excepthook

    def speak(kind: Any, value: Any, traceback: Any) -> None:
        before(kind, value, traceback)
        if _outermost is not speak:
            return
        others = silent() if silent is not None and _is_of_a_collective(value) else ''
        reasons = [others] if others else []
        text = '; '.join([*reasons, f'{kind.__name__}: {value}'])
        where = f'rank {rank} on {socket.gethostname()}'
        print(f'{where} ends the job: {text}', file=sys.stderr, flush=True)
        if afterwards is not None:
            afterwards()

    sys.excepthook = _outermost = speak


def _is_of_a_collective(error: BaseException) -> bool:
    known = isinstance(error, torch_dist.DistError | RankError)
    return known or (isinstance(error, RuntimeError) and 'gloo' in str(error))
