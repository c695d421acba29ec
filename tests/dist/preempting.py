"""Interrupts training runs again and again, and lets them go on, until they have finished.

One process imports everything once and forks the ranks of each trial, which run the training
program; from outside it kills all of them, or signals one or all, at a random update.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from internvl_ds.config.tree import get_config
from internvl_ds.dist import preemption
from internvl_ds.dist.process_group import init_distributed, leave
from internvl_ds.dist.rendezvous import rank
from internvl_ds.train import loop
from internvl_ds.train.reporting import progress
from tests.harness.forking import fork_ranks, main

RANKS = 2
TRIAL_LIMIT = 90.0  # seconds
STOPPED = 7  # TRAIN.PREEMPT_EXIT_CODE in these runs


class TellingProgress(progress.Progress):
    """Writes down every micro-batch's loss and norm, exactly, as the ranks come by."""

    folder: Path

    def step(self, loss: torch.Tensor, norm: torch.Tensor | None, *rest: Any) -> None:
        index = self._done
        told = [self._epoch, index, loss.item().hex(), None if norm is None else norm.item().hex()]
        with (self.folder / f'steps_{rank()}').open('a') as file:
            file.write(json.dumps(told) + '\n')
        super().step(loss, norm, *rest)


def train(cfg: str, ds_config: str, output: str, opts: list[str], folder: Path) -> None:
    """What one rank does: the training program, with a shorter look-out for requests."""
    preemption._INTERVAL = 0.05  # an update takes no longer here
    loop.Progress = TellingProgress
    TellingProgress.folder = folder
    config = get_config(Namespace(cfg=cfg, output=output, opts=opts))
    init_distributed(config)
    status = 0
    try:
        loop.run(config, ds_config)
    except preemption.Preempted:
        status = config.TRAIN.PREEMPT_EXIT_CODE
    leave(status)


def trial(plan: dict[str, Any] | None, folder: Path, **run: Any) -> dict[str, Any]:
    """Forks the ranks, interrupts them as planned, and tells how they ended and what they did.

    A plan has ``after``, how many micro-batches of this trial rank 0 shall have done; ``signal``;
    ``ranks``, which get it; ``delay``, seconds.
    """
    folder.mkdir(parents=True)
    children = fork_ranks(RANKS, folder, lambda: train(folder=folder, **run))
    statuses = _watch(children, plan, folder)
    return {
        'plan': plan,
        'statuses': statuses,
        'steps': [_steps(folder, r) for r in range(RANKS)],
        'logs': [(folder / f'log_{r}').read_text()[-3000:] for r in range(RANKS)],
    }


def _watch(children: list[int], plan: dict[str, Any] | None, folder: Path) -> list[int]:
    """Interrupts as planned; returns exit statuses, negative for a signal."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + TRIAL_LIMIT
    due = None
    while len(statuses) < RANKS:
        for pid in set(children) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if plan is not None and due is None and len(_steps(folder, 0)) >= plan['after']:
            due = now + plan['delay']
        if due is not None and now >= due:
            for r in plan['ranks']:
                if children[r] not in statuses:
                    os.kill(children[r], plan['signal'])
            plan, due = None, None
        if now > deadline:
            for pid in set(children) - statuses.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[pid] for pid in children]


def _steps(folder: Path, r: int) -> list[list[Any]]:
    path = folder / f'steps_{r}'
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('\n')]


def chain(
    seed: int, kills: int, stops: int, folder: str, outputs: str, micro_batches: int, **run: Any
) -> list[dict[str, Any]]:
    """A whole run, and then interrupted ones until there were enough kills and stops.

    Returns:
        What each trial told, with ``output``, its directory. A run that has finished is left where
        it is, and the next one begins anew.
    """
    chance = random.Random(seed)
    left = [signal.SIGKILL] * kills + [signal.SIGTERM, signal.SIGUSR1] * (stops // 2)
    chance.shuffle(left)
    trials: list[dict[str, Any]] = []
    runs = 0

    def one(plan: dict[str, Any] | None) -> dict[str, Any]:
        output = f'{outputs}/{runs}'
        told = trial(plan, Path(folder, str(len(trials))), output=output, **run)
        trials.append({**told, 'output': output})
        return told

    one(None)
    runs = 1
    while left:
        number = left[-1]
        ranks = chance.choice([[0], [1], [0, 1]])
        told = one(
            {
                'after': chance.randint(1, micro_batches // 3),
                'delay': chance.uniform(0, 0.1),
                'signal': int(number),
                'ranks': [0, 1] if number == signal.SIGKILL else ranks,
            }
        )
        if told['statuses'] == [0, 0]:  # it came too late: the run has finished
            runs += 1
        elif told['statuses'] in ([STOPPED] * RANKS, [-signal.SIGKILL] * RANKS):
            left.pop()
        else:
            return trials  # the test will say so
    one(None)
    return trials


if __name__ == '__main__':
    main(chain)
