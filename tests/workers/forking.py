"""Ranks forked from a process that has imported everything: dozens of trials without waiting."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

from internvl_ds.comm import free_port


def fork_ranks(ranks: int, folder: Path, action: Callable[[], object]) -> list[int]:
    """Has ``action`` run in new processes, as the ranks of a job with a port of its own.

    Each prints into ``folder/log_RANK``, and ends with status 1 if it has not ended itself.

    Returns:
        Process ids, in rank order.
    """
    port = str(free_port())
    children = []
    for r in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update(
                RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(ranks),
                MASTER_ADDR='127.0.0.1', MASTER_PORT=port,
            )  # fmt: skip
            log = os.open(folder / f'log_{r}', os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                action()
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        children.append(pid)
    return children
