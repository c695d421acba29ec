"""Ranks killed at random moments of saves: what was committed is there, and training goes on.

    python -m tests.bench.kills [--count 300] [--seed S] [--out FOLDER]    prints a Markdown table

Four chains at a time, a script's loop and the training program at two ZeRO stages each. Each life
of a chain resumes what the last one left, on two ranks, and one rank or both are killed (SIGKILL):
at a random file call of a save, or at a random time from its beginning on. After every kill all
that a user counts on is checked; the first thing that is not so ends it with exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch

from internvl_ds.checkpoint.tag import discovery
from internvl_ds.checkpoint.tag.verify import damage_of_tag
from internvl_ds.config.ds import schema as ds_schema
from internvl_ds.dist.network import free_port
from tests.harness import killing
from tests.harness.forking import fork_ranks
from tests.harness.forkserver import preload
from tests.harness.training import write_folder

RANKS = 2
EPOCHS = 10  # of two updates each; a chain that comes near the end begins anew
LIFE_LIMIT = 240.0  # seconds of a life that nobody kills
# Seconds from a kill to the end of a rank that is left to end by itself, whatever COMM.TIMEOUT and
# CHECKPOINT.IO_TIMEOUT are: half an hour here.
ENDS_WITHIN = 30.0
CHAINS = [('script', 1), ('script', 3), ('program', 1), ('program', 3)]
# What a user may have put into OUTPUT.
USERS = {
    'notes.txt': b'mine', 'plots/curve.bin': bytes(range(256)), '.hidden/keep': b'',
    '.trash-ckpt_epoch_0/a': b'1', '.old-ckpt_epoch_best/a': b'2', '.staging-mine/a': b'3',
    'my.ckpt': b'x', 'ckpt_epoch_mine.txt': b'no tag', '.latest.mine': b'7',
}  # fmt: skip


class Wrong(AssertionError):
    """What a kill did that it must not."""


@dataclass
class Chain:
    """One program at one stage, killed and started again in one OUTPUT.

    Attributes:
        digests: of the state after each update, by (update, rank), of a run that was never
            interrupted and saved nothing.
        records: that run's lines of metrics.jsonl, by epoch.
        may_be: the updates that the next life may go on from.
        counted, best: whether an epoch or step tag, and one saved as best, are there for good.
        named: whether a save of a counted tag was told of, so that there is a ``latest``.
        span: how many file calls a save takes, by (asynchronous, rank), and seconds.
    """

    program: str
    stage: int
    folder: Path
    data: str
    kills: int
    chance: random.Random
    output: Path = Path()
    digests: dict[tuple[int, int], str] = field(default_factory=dict)
    records: dict[int, Any] = field(default_factory=dict)
    may_be: set[int] = field(default_factory=lambda: {0})
    counted: bool = False
    named: bool = False
    best: bool = False
    span: dict[bool, tuple[list[int], float]] = field(default_factory=dict)
    lives: int = 0
    sessions: list[int] = field(default_factory=list)
    ports: list[str] = field(default_factory=list)
    hits: Counter = field(default_factory=Counter)
    longest: float = 0.0

    def plan(self) -> dict[str, Any]:
        """Draws what happens in a life; the first two measure how long a save takes."""
        chance, kind = self.chance, self.chance.random() < 0.5
        missing = [kind for kind in (False, True) if kind not in self.span]
        plan: dict[str, Any] = {
            'async': missing[0] if missing else kind, 'steps': chance.random() < 0.5,
            'best': chance.random() < 0.5, 'save': 0, 'victim': None, 'call': 0, 'after': 0.0,
            'grace': chance.choice([0.0, 0.3, None, None]), 'epochs': EPOCHS,
            'data': self.data, 'workers': int(self.stage == 3),
            'plots': chance.random() < 0.1,  # which take longer than all else in an epoch
        }  # fmt: skip
        if not missing:
            calls, seconds = self.span[kind]
            plan['save'] = chance.randint(1, killing.SAVES)
            plan['victim'] = chance.choice([0, 1, 'all'])
            if chance.random() < 0.7:
                plan['call'] = chance.randint(1, calls[plan['victim'] == 1])
            else:
                plan['after'] = chance.uniform(0, seconds)
        return plan

    def refer(self) -> None:
        """Runs the program without a save and without a kill, for what each state has to be."""
        plan = self.plan()
        updates = 2 * EPOCHS
        plan.update(updates=updates, steps=False, best=False, plots=False)
        self.output = self.folder / 'reference'
        life = self.live(plan)
        _require(life['statuses'] == [0, 0], 'the run that nobody kills failed', life)
        for rank, events in enumerate(life['events']):
            for event in events:
                if event['what'] in ('resumed', 'update'):
                    self.digests[event['key'], rank] = event['digest']
                for record in event.get('records', ()):
                    self.records[record['epoch']] = record
        _require((updates, 1) in self.digests, 'the run that nobody kills ended early', life)

    def begin(self) -> None:
        """Takes a fresh OUTPUT, with a user's files in it."""
        self.output, self.may_be = self.folder / f'out{self.lives}', {0}
        self.counted = self.named = self.best = False
        for name, content in USERS.items():
            path = self.output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (self.output / 'link').symlink_to('nowhere')

    def live(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Starts the ranks, kills as planned, and returns what they told."""
        folder = self.folder / f'life{self.lives}'
        folder.mkdir()
        self.lives += 1
        act = killing.PROGRAMS[self.program]
        port = str(free_port())

        def action() -> None:
            os.setsid()
            killing.live(lambda: act(str(self.output), self.stage, folder, plan))

        pids = fork_ranks(RANKS, folder, action, port)
        self.sessions += pids
        self.ports.append(port)
        statuses, killed_at, ended_at = _watch(pids, folder, plan)
        return {
            'plan': plan,
            'statuses': statuses,
            'seconds': ended_at - killed_at if killed_at else 0.0,
            'killed': killed_at is not None,
            'events': [_events(folder / f'events_{r}') for r in range(RANKS)],
            'logs': [_without_noise(folder / f'log_{r}')[-2500:] for r in range(RANKS)],
        }

    def check(self, life: dict[str, Any]) -> None:
        """Compares a life, and what it left, with what has to be."""
        plan = life['plan']
        found = [[e for e in events if e['what'] == 'resumed'] for events in life['events']]
        _require(all(len(one) == 1 for one in found), 'did not resume', life)
        first = found[0][0]['key']
        _require(first in self.may_be, f'resumed {first}, not one of {sorted(self.may_be)}', life)
        for rank, events in enumerate(life['events']):
            _require(found[rank][0]['key'] == first, 'ranks resumed different states', life)
            for event in events:
                key = event.get('key')
                if event['what'] in ('resumed', 'best', 'update'):
                    same = self.digests.get((key, rank)) == event['digest']
                    _require(same, f'rank {rank} has another state after update {key}', life)
                for record in event.get('records', ()):
                    same = record == self.records[record['epoch']]
                    _require(same, f'metrics.jsonl has another epoch {record["epoch"]}', life)
                if 'records' in event and rank == 0:
                    epochs = [record['epoch'] for record in event['records']]
                    _require(epochs == list(range(event['epoch'])), 'epochs are missing', life)
        # A kill between two renames leaves it aside, whence the next start brings it back.
        _require(found[0][0]['best'] or not self.best, 'the best is gone', life)
        events = [event for one in life['events'] for event in one]
        done = _done(life)
        # Where no tag was ever counted, one that was saved as best is better than none.
        tag = found[0][0]['tag']
        self.named |= any(e['counted'] for e in done)
        self.counted |= self.named or (bool(tag) and not tag.endswith('best'))
        begun = {
            e['key'] for e in events
            if e['what'] == 'begin' and (e['counted'] or not self.counted)
        }  # fmt: skip
        least = max([first, *(e['key'] for e in done if e['counted'] or not self.counted)])
        self.may_be = {key for key in {first, *begun} if key >= least}
        self.best |= any(e['tag'] == 'ckpt_epoch_best' for e in done)
        if plan['victim'] is None:
            _require(life['statuses'] == [0, 0], 'a life that nobody killed failed', life)
        if plan['grace'] is None and life['killed']:
            own = [s for s in life['statuses'] if s != -signal.SIGKILL or plan['victim'] == 'all']
            _require(own or plan['victim'] == 'all', 'a survivor had to be ended', life)
            self.longest = max(self.longest, life['seconds'])
        self.check_files(life)

    def check_files(self, life: dict[str, Any]) -> None:
        """What lies in OUTPUT now, right after the kill, before anything has looked at it."""
        for name, content in USERS.items():
            path = self.output / name
            same = path.is_file() and path.read_bytes() == content
            _require(same, f'{name} of the user is not what it was', life)
        _require(os.readlink(self.output / 'link') == 'nowhere', 'a link of the user is gone', life)
        tags = [p for p in self.output.glob('ckpt_*') if p.is_dir()]
        for tag in tags:
            _require(damage_of_tag(tag) == [], f'{tag.name} is not whole', life)
            for path in tag.rglob('*'):
                held = path.is_file() and killing.PASSWORD.encode() in path.read_bytes()
                _require(not held, f'{path} holds the password of an address', life)
        latest = self.output / 'latest'
        if latest.exists():
            named = self.output / latest.read_text().strip()
            _require(named in tags, f'latest names {named.name}, which is not there', life)
        else:
            _require(not self.named, 'latest is gone', life)
        if 0 not in self.may_be:
            resume = discovery.newest(self.output, {})
            _require(resume is not None and resume.path in tags, 'nothing to resume', life)

    def count(self, life: dict[str, Any]) -> None:
        """Notes what was hit: by asynchronous, kind of save, victim, inside a save or not."""
        plan = life['plan']
        victim = 0 if plan['victim'] == 'all' else plan['victim']
        saves = [e for e in life['events'][victim] if e['what'] in ('begin', 'return')]
        tag = saves[-1]['tag'] if saves else ''
        kind = 'best' if tag.endswith('best') else 'step' if '_step_' in tag else 'epoch'
        inside = bool(saves) and (saves[-1]['what'] == 'begin' or plan['call'] > 0)
        self.hits[plan['async'], kind, str(plan['victim']), inside] += 1

    def measure(self, life: dict[str, Any]) -> None:
        """Takes the length of a save from a life that nobody killed."""
        calls, seconds = [], 0.0
        for events in life['events']:
            first = next(e for e in events if e['what'] == 'begin')
            last = events[-1]
            saves = sum(e['what'] == 'begin' for e in events)
            calls.append(max(1, (last['calls'] - first['calls']) // saves))
            seconds = max(seconds, (last['at'] - first['at']) / saves)
        self.span[life['plan']['async']] = calls, seconds

    def run(self) -> None:
        """Lives until so many were killed as asked for."""
        self.refer()
        self.begin()
        limit, killed, missed = 2 * EPOCHS - 2 * killing.SAVES, 0, 0
        while killed < self.kills:
            if max(self.may_be) > limit:
                self.begin()
            life = self.live(self.plan())
            self.check(life)
            if life['plan']['victim'] is None:
                self.measure(life)
            elif life['killed']:
                killed += 1
                self.count(life)
            else:
                missed += 1
                _require(
                    missed < self.kills + 10, 'too many lives end before they are killed', life
                )
            shutil.rmtree(self.folder / f'life{self.lives - 1}')
        self.require_nothing_left()

    def require_nothing_left(self) -> None:
        """No process of any life, and nothing of theirs in shared memory."""
        deadline = time.monotonic() + ENDS_WITHIN
        while left := _in_sessions(set(self.sessions)):
            if time.monotonic() > deadline:
                raise Wrong(f'processes are left: {left}')
            time.sleep(0.2)
        marks = [f'_{mark}_' for mark in (*self.sessions, *self.ports)]
        shared = [p.name for p in Path('/dev/shm').iterdir() if any(m in p.name for m in marks)]
        if shared:
            raise Wrong(f'left in /dev/shm: {shared}')


def _done(life: dict[str, Any]) -> list[dict[str, Any]]:
    """The saves that are known to be committed: told of, or in the background waited for."""
    done = []
    for events in life['events']:
        returned = [e for e in events if e['what'] in ('return', 'waited')]
        if life['plan']['async']:
            returned = returned[:-1]  # the next save waits for the one before it
        done += [e for e in returned if e['what'] == 'return']
    return done


def _wrong(what: str, life: dict[str, Any]) -> Wrong:
    told = {k: v for k, v in life.items() if k not in ('events', 'logs')}
    events = '\n'.join(
        f'rank {r}: ' + ' '.join(f'{k}={str(v)[:90]}' for k, v in e.items())
        for r, one in enumerate(life['events']) for e in one[-12:]
    )  # fmt: skip
    logs = '\n'.join(f'--- rank {r}:\n{log}' for r, log in enumerate(life['logs']))
    return Wrong(f'{what}: {told}\n{events}\n{logs}')


def _require(holds: Any, what: str, life: dict[str, Any]) -> None:
    if not holds:
        raise _wrong(what, life)


def _without_noise(log: Path) -> str:
    lines = log.read_text(errors='replace').splitlines()
    return '\n'.join(x for x in lines if 'FutureWarning' not in x and 'return func(' not in x)


def _events(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # killed while it wrote this one
            found.append(json.loads(line))
    return found


def _watch(
    pids: list[int], folder: Path, plan: dict[str, Any]
) -> tuple[list[int], float | None, float]:
    """Kills as planned, and later whoever is left.

    Returns:
        Exit statuses, negative for a signal; when the first was killed; when the last has ended.
    """
    statuses: dict[int, int] = {}
    deadline, killed_at, due_at, asked = time.monotonic() + LIFE_LIMIT, None, None, False
    victims = pids if plan['victim'] == 'all' else [pids[plan['victim'] or 0]]
    while True:
        for pid in set(pids) - statuses.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        killed = any(statuses.get(pid) == -signal.SIGKILL for pid in victims)
        if killed and killed_at is None and plan['victim'] is not None:
            killed_at = now
            deadline = now + (ENDS_WITHIN if plan['grace'] is None else plan['grace'])
        if len(statuses) == len(pids):
            return [statuses[pid] for pid in pids], killed_at, now
        if due_at is None and all((folder / f'due_{pids.index(pid)}').exists() for pid in victims):
            due_at = now
        due = plan['after'] > 0 and due_at is not None and now > due_at + plan['after']
        if now > deadline and plan['grace'] is None and not asked:
            for pid in set(pids) - statuses.keys():  # where they are, for their logs
                os.kill(pid, signal.SIGQUIT)
            deadline, asked = now + 2, True
        for pid in pids if now > deadline else victims if due else ():
            if pid not in statuses:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _in_sessions(sessions: set[int]) -> list[str]:
    """The processes of these sessions, which their leaders may have left behind."""
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = path.read_text()
            state, *numbers = text.rpartition(')')[2].split()[:4]
            if int(numbers[2]) in sessions and state != 'Z':
                found.append(text[:80])
    return found


def run(count: int, seed: int, folder: Path) -> list[Chain]:
    """Runs all chains, each in a process of its own; returns what they were.

    Raises:
        Wrong: with the text of the first chain that found something.
    """
    torch.set_num_threads(1)
    preload()
    # What each life would find out anew.
    deepspeed.ops.__compatible_ops__  # noqa: B018
    ds_schema.installed()
    data = str(write_folder(folder / 'images', classes=3, train=29, val=7))
    chains, children = [], {}
    for number, (program, stage) in enumerate(CHAINS):
        kills = count // len(CHAINS) + (number < count % len(CHAINS))
        place = folder / f'{program}{stage}'
        place.mkdir()
        chance = random.Random(f'{seed} {program} {stage}')
        chains.append(Chain(program, stage, place, data, kills, chance))
        children[os.fork() or _run_alone(chains[-1])] = chains[-1]
    wrong = []
    for pid, chain in children.items():
        os.waitpid(pid, 0)
        told = json.loads((chain.folder / 'told.json').read_text())
        chain.hits = Counter({tuple(key): hits for key, hits in told['hits']})
        chain.longest, chain.lives = told['longest'], told['lives']
        if told['wrong']:
            wrong.append(f'{chain.program} at stage {chain.stage}, seed {seed}: {told["wrong"]}')
    if wrong:
        raise Wrong('\n'.join(wrong))
    return chains


def _run_alone(chain: Chain) -> int:
    """What the process of a chain does; it does not return."""
    wrong = ''
    try:
        chain.run()
    except Wrong as error:
        wrong = str(error)
        for session in chain.sessions:  # a worker whose rank was killed may be there
            for process in _in_sessions({session}):
                os.kill(int(process.split()[0]), signal.SIGKILL)
    except BaseException:
        wrong = traceback.format_exc()
    told = {
        'hits': list(chain.hits.items()), 'longest': chain.longest, 'lives': chain.lives,
        'wrong': wrong,
    }  # fmt: skip
    try:
        (chain.folder / 'told.json').write_text(json.dumps(told))
    finally:
        os._exit(0)


def table(chains: list[Chain]) -> str:
    """The hits, in Markdown."""
    lines = [
        '| program | ZeRO | kills | inside a save | async | step | best | rank 0, 1, both | lives |'
        ' slowest end, s |',
        '|---|---|---|---|---|---|---|---|---|---|',
    ]
    for chain in chains:

        def hits(place: int, value: Any, counter: Counter = chain.hits) -> int:
            return sum(n for key, n in counter.items() if key[place] == value)

        victims = ', '.join(str(hits(2, victim)) for victim in ('0', '1', 'all'))
        lines.append(
            f'| {chain.program} | {chain.stage} | {sum(chain.hits.values())} | {hits(3, True)} | '
            f'{hits(0, True)} | {hits(1, "step")} | {hits(1, "best")} | {victims} | '
            f'{chain.lives} | {chain.longest:.1f} |'
        )
    total = sum(sum(chain.hits.values()) for chain in chains)
    inside = sum(n for chain in chains for key, n in chain.hits.items() if key[3])
    return '\n'.join([*lines, '', f'{total} kills, {inside} inside a save'])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--count', type=int, default=300)
    parser.add_argument('--seed', type=int, default=random.randrange(1 << 30))
    parser.add_argument('--out', type=Path, help='a folder that stays; default: a temporary one')
    args = parser.parse_args()
    start = time.monotonic()
    # No TemporaryDirectory: the exit functions of a rank that ends by itself would remove it.
    folder = args.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        chains = run(args.count, args.seed, folder)
    except Wrong as error:
        print(error)
        return 1
    finally:
        if args.out is None:
            shutil.rmtree(folder)
    print(table(chains), f'in {time.monotonic() - start:.0f} s, seed {args.seed}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
