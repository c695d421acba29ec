"""Kills ranks in the middle of saves, again and again, in one directory.

One process imports everything once and forks the ranks of each trial. A trial resumes what the
last one left, tells the digest of the state that it found, trains one update, and saves it as best
and as an epoch while ranks are killed: at a random time, or at a random file system call.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from internvl_ds import auto_resume_helper, load_ema_checkpoint
from internvl_ds.checkpoint import background
from internvl_ds.checkpoint.lookup import read_header
from internvl_ds.checkpoint.verify import damage_of_tag
from internvl_ds.comm import init_distributed
from internvl_ds.masters import master_weights
from internvl_ds.meetings import rank
from tests.workers.forking import fork_ranks, main
from tests.workers.saving import Run, logger

RANKS = 2
TRIAL_LIMIT = 90.0  # seconds
_CALLS = ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.chmod', 'shutil.rmtree')


def state_digest(run: Run) -> str:
    """Of all that a resume has to bring back on this rank, bit for bit."""
    digest = hashlib.sha256()
    optimizer_state = [
        (key, value)
        for tensors in run.engine.basic_optimizer.state.values()
        for key, value in sorted(tensors.items())
    ]
    parts = [
        *master_weights(run.engine).items(),
        *optimizer_state,
        *run.ema._shards.items(),
        *run.ema._buffers.items(),
        ('counts', [run.engine.global_steps, run.ema.num_updates, run.scheduler.state_dict()]),
    ]
    for name, value in parts:
        digest.update(str(name).encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


class FileCalls:
    """Counts what this process does to files below a directory; kills it at the n-th."""

    def __init__(self, root: str) -> None:
        self.root, self.count, self.fatal, self.on = root, 0, -1, False
        sys.addaudithook(self._audited)
        for name in ('write', 'fsync'):
            setattr(os, name, self._counted(getattr(os, name)))

    def _audited(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event in _CALLS and str(args[0]).startswith(self.root):
            self._step()

    def _counted(self, call: Any) -> Any:
        def counted(*args: Any) -> Any:
            if self.on:
                self._step()
            return call(*args)

        return counted

    def _step(self) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def trial(output: str, stage: int, folder: Path, plan: dict[str, Any]) -> None:
    """What one rank does; see the module."""
    calls = FileCalls(output)
    init_distributed()
    run = Run(stage, 'fp32', output, CHECKPOINT__ASYNC=plan['async'], SAVE_CKPT_NUM=2)
    found: dict[str, Any] = {'step': 0, 'best': None}
    resume = auto_resume_helper(output)
    best = Path(output, 'ckpt_epoch_best')
    if best.exists():
        run.load(str(best))
        load_ema_checkpoint(run.config, run.ema, logger)
        found['best'] = run.engine.global_steps
        found['best digest'] = state_digest(run)
    if resume is not None:
        header = read_header(Path(resume))
        assert header is not None
        run.load(resume)
        load_ema_checkpoint(run.config, run.ema, logger)
        found.update(step=run.engine.global_steps, tag=Path(resume).name, digest=state_digest(run))
    if rank() == 0:
        tags = [p for p in Path(output).glob('*') if p.is_dir()] if Path(output).exists() else []
        found['hidden'] = sorted(p.name for p in tags if p.name.startswith('.'))
        found['damage'] = {p.name: damage_of_tag(p) for p in tags if not p.name.startswith('.')}
    _tell(folder, 'found', found)
    step = run.engine.global_steps
    run.steps(step, step + 1)
    _tell(folder, 'trained', {'step': run.engine.global_steps, 'digest': state_digest(run)})
    torch.distributed.barrier()
    calls.on = True
    if plan['victim'] in (rank(), 'all'):
        calls.fatal = plan['call']
    (folder / f'saving_{rank()}').touch()
    start = time.monotonic()
    for best_name in ('best', None) if plan['best'] else (None,):
        run.save(step, best=best_name)
    _tell(folder, 'returned', {'step': step + 1})
    if plan['async']:
        run.steps(step + 1, step + 2)
        background.wait()
    calls.on = False
    done = {'calls': calls.count, 'seconds': time.monotonic() - start, 'step': step + 1}
    _tell(folder, 'committed', done)
    os._exit(0)


def _tell(folder: Path, what: str, value: dict[str, Any]) -> None:
    path = folder / f'{what}_{rank()}.json'
    aside = path.with_suffix('.tmp')
    aside.write_text(json.dumps(value))
    aside.rename(path)


def _heard(folder: Path, what: str) -> list[dict[str, Any] | None]:
    paths = [folder / f'{what}_{r}.json' for r in range(RANKS)]
    return [json.loads(p.read_text()) if p.exists() else None for p in paths]


def _run_trial(output: str, stage: int, folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(parents=True)
    children = fork_ranks(RANKS, folder, lambda: trial(output, stage, folder, plan))
    start = time.monotonic()
    statuses = _watch(children, folder, plan)
    return {
        'plan': plan,
        'statuses': statuses,
        'seconds': time.monotonic() - start,
        **{k: _heard(folder, k) for k in ('found', 'trained', 'returned', 'committed')},
        'logs': [(folder / f'log_{r}').read_text()[-3000:] for r in range(RANKS)],
    }


def _watch(children: list[int], folder: Path, plan: dict[str, Any]) -> list[int]:
    """Kills as planned, and later whoever is left; returns wait statuses."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + TRIAL_LIMIT
    victims = children if plan['victim'] == 'all' else [children[plan['victim'] or 0]]
    saving_since = None
    while len(statuses) < RANKS:
        for pid in set(children) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = status
                if status != 0:  # the others cannot go on: they get a moment, or none
                    deadline = min(deadline, time.monotonic() + plan['grace'])
        if saving_since is None and all((folder / f'saving_{r}').exists() for r in range(RANKS)):
            saving_since = time.monotonic()
        now = time.monotonic()
        due = plan['after'] >= 0 and saving_since is not None and now > saving_since + plan['after']
        # The deadline goes first: a rank whose peer is dead may wait for it for half an hour.
        for pid in children if now > deadline else victims if due else ():
            if pid not in statuses:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    return [statuses[pid] for pid in children]


def chain(output: str, stage: int, seed: int, kills: int, folder: str) -> list[dict[str, Any]]:
    """Trials until ``kills`` of them had a rank killed while it saved; returns what each told."""
    chance = random.Random(seed)
    trials: list[dict[str, Any]] = []
    # How many file calls, and how long, a whole save takes: by (asynchronous, with best).
    calls: dict[tuple[bool, bool], list[int]] = {}
    seconds: dict[tuple[bool, bool], float] = {}
    killed = 0
    while killed < kills:
        kind = (chance.random() < 0.5, chance.random() < 0.5)
        plan: dict[str, Any] = {
            'async': kind[0], 'best': kind[1], 'victim': None, 'call': -1, 'after': -1.0,
            'grace': chance.choice([0.0, 0.3]),
        }  # fmt: skip
        if kind in calls:
            plan['victim'] = chance.choice([0, 1, 'all'])
            if chance.random() < 0.7:
                plan['call'] = chance.randint(1, calls[kind][plan['victim'] == 1])
            else:
                plan['after'] = chance.uniform(0, seconds[kind])
        result = _run_trial(output, stage, Path(folder, str(len(trials))), plan)
        trials.append(result)
        if plan['victim'] is None:
            if result['committed'][0] is None or result['committed'][1] is None:
                break  # it had to succeed: the test will say so
            calls[kind] = [told['calls'] for told in result['committed']]
            seconds[kind] = max(told['seconds'] for told in result['committed'])
        elif any(os.WIFSIGNALED(status) for status in result['statuses']):
            killed += 1
    return trials


if __name__ == '__main__':
    main(chain)
