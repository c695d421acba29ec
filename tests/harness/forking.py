"""Ranks forked from a process that has imported everything: dozens of trials without waiting.

    trials = run_chain('tests.harness.killing', tmp_path, timeout, seed=1, ...)

has that module's ``chain`` make its trials in a process of its own, whose main is `main`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from internvl_ds.dist.network import free_port
from tests.harness.forkserver import preload
from tests.harness.ranks import run_command


def run_chain(
    module: str, place: Path, timeout: float, /, **arguments: Any
) -> list[dict[str, Any]]:
    """What the trials of ``module``'s chain told.

    Args:
        module: its main calls `main` with its chain.
        place: the folder where arguments and results go.
        timeout: seconds until all of it is ended.
        **arguments: of the chain; JSON values.
    """
    file = place / 'chain.json'
    file.write_text(json.dumps(arguments))
    job = run_command([sys.executable, '-m', module, str(file)], timeout=timeout)
    assert job.returncode == 0, job.output[-4000:]
    return json.loads(file.with_suffix('.result').read_text())


def main(chain: Callable[..., list[dict[str, Any]]]) -> None:
    """Runs a chain with the arguments in the file that the command line names."""
    file = Path(sys.argv[1])
    torch.set_num_threads(1)
    preload()
    results = chain(**json.loads(file.read_text()))
    file.with_suffix('.result').write_text(json.dumps(results))


def fork_ranks(
    ranks: int, folder: Path, action: Callable[[], object], port: str | None = None
) -> list[int]:
    """Has ``action`` run in new processes, as the ranks of a job with a port of its own.

    It is ``port`` where that is given. Each rank prints into ``folder/log_RANK``, and ends with
    status 1 if it has not ended itself.

    Returns:
        Process ids, in rank order.
    """
    port = port or str(free_port())
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
