"""One of two ranks meets a fault at a named place: seconds until the other ends, and what it says.

The ranks are forked from prepared processes, without a launcher, and go through the stories of
`tests.harness.places`. At its place a rank is killed, stopped, or its host is cut off from the
other's. Which places there are is found by a normal run of each story.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_ds.dist.network import free_port
from tests.harness import hosts
from tests.harness import places as places_ranks
from tests.harness.forkserver import Forked, fork
from tests.harness.places import STORIES
from tests.harness.ranks import ROOT, base_env, run_ranks
from tests.harness.training import write_folder

KILLED, STOPPED, CUT = 'killed', 'stopped', 'cut'
FAULTS = (KILLED, STOPPED, CUT)

LIMIT = 10.0  # seconds: every limit of a job in which a rank is stopped or cut off
EXIT = 5.0  # seconds: COMM.EXIT_TIMEOUT and COMM.DEAD_AFTER there
LONG = 600  # every limit of a job in which a rank is killed: it must not matter
MARGIN = 5.0  # seconds that a wait may last longer than its limit
DEAD = 15.0  # seconds within which the others of a dead rank end

_START = 120.0  # seconds until a rank is at its place
_PATIENCE = 30.0  # seconds beyond the limit, after which a job is ended
_PROMPT = 8.0  # seconds: whoever ends so soon has waited for nobody

_ABSENT = 'it did not come to the place'

_HOST_PAIRS = 8
_starting = threading.Semaphore(3)

# The order of the normal runs, of which later ones read what the first ones leave.
_LEAVE = {'save': ('output', 'output'), 'train': ('output/train', 'train')}
_FIRST, _THEN = tuple(_LEAVE), ('time_updates', 'fine_tune')


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        story: of `tests.harness.places`.
        name: of the place in it, and for the how many-th time, as 'commit #1'.
    """

    story: str
    name: str

    @property
    def what(self) -> str:
        """The name without a number."""
        return self.name.rpartition(' #')[0]

    @property
    def joins(self) -> bool:
        """Whether the ranks are not together yet."""
        return self.what.startswith(('before joining', 'connected', 'start', 'torch joins'))

    @property
    def inside(self) -> bool:
        """Whether this rank has brought to a meeting what the others wait for."""
        return self.what.endswith(', inside')

    @property
    def may_be_last(self) -> bool:
        """Whether the others may have no more to wait for, and end as if nothing was."""
        return self.inside or self.what == 'last meeting'


# Rank 0 has its store open, and the other one comes when rank 0 does not answer any more.
LATE = Place('join', 'before joining, late #1')


@dataclass(frozen=True)
class Trial:
    """A fault, the rank that it meets, and where."""

    fault: str
    place: Place
    victim: int

    @property
    def limit(self) -> float:
        """Seconds within which the others must end."""
        if self.fault == KILLED and not self.place.joins:
            return DEAD
        # Whoever has what it needs first waits until the other has read, and then for what is next.
        twice = self.place.inside or self.fault == CUT
        return (EXIT if twice else 0) + LIMIT + MARGIN

    def limits(self) -> dict[str, Any]:
        """What the job is told."""
        value = LONG if self.fault == KILLED else int(LIMIT)
        return {
            'COMM__INIT_TIMEOUT': int(LIMIT) if self.place.joins else 120,
            'COMM__TIMEOUT': value,
            'COMM__EXIT_TIMEOUT': LONG if self.fault == KILLED else int(EXIT),
            'COMM__DEAD_AFTER': int(EXIT),
            'CHECKPOINT__RENDEZVOUS_TIMEOUT': value,
            'CHECKPOINT__IO_TIMEOUT': value,
        }


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        seconds: from the fault until every other rank has ended; infinite where one had to be.
        statuses: of the ranks, None for those that had to be ended.
        says: what the last of the others said in the end.
        names: whether it names the one that is missing.
        waits_in: where it still was, when it had to be ended.
        output: all that it printed.
    """

    trial: Trial
    seconds: float
    statuses: list[int | None]
    says: str
    names: bool
    waits_in: str
    output: str

    def is_right(self, slack: float = 0.0) -> bool:
        """Whether it ended in time, failed, and said who is missing.

        Args:
            slack: seconds more than the limit, for a machine that has other work.
        """
        status = self.statuses[1 - self.trial.victim]
        if self.trial.place.may_be_last and status == 0 and self.seconds < _PROMPT:
            return True
        failed = self.trial.place.may_be_last or status != 0
        return self.seconds <= self.trial.limit + slack and failed and self.names


class Ranks:
    """Two ranks that go through a story."""

    def __init__(
        self, folder: Path, story: str, shared: Path, limits: dict[str, Any],
        place: str | None = None, stays: int | None = None, two: hosts.Hosts | None = None,
    ) -> None:  # fmt: skip
        """Starts them.

        Args:
            folder: theirs alone.
            shared: what earlier normal runs left.
            limits: settings, dotted keys written with ``__``.
            place, stays: where which rank stays.
            two: the hosts to be on; None for this one.
        """
        self.folder, self.port = folder, str(free_port())
        folder.mkdir(parents=True)
        pids = [two.pid(host) for host in range(2)] if two else None
        plan = folder / 'plan.json'
        plan.write_text(
            json.dumps(
                {'story': story, 'shared': str(shared), 'limits': limits, 'place': place,
                 'stays': stays, 'hosts': pids}
            )
        )  # fmt: skip
        self.logs = [folder / f'rank_{rank}.log' for rank in range(2)]
        self.processes: list[Forked] = []
        for rank in range(2):
            env = base_env(
                RANK=str(rank), LOCAL_RANK='0' if two else str(rank), WORLD_SIZE='2',
                MASTER_ADDR='10.99.0.1' if two else '127.0.0.1', MASTER_PORT=self.port,
            )  # fmt: skip
            self.processes.append(
                fork(
                    f'rank {rank} [] {sys.executable}', [str(plan)], env, self.logs[rank], ROOT,
                    sys.executable, 'tests.harness.places:live',
                )
            )  # fmt: skip

    def wait(self, ranks: Iterable[int], seconds: float) -> bool:
        """Whether these ranks have ended, within so many seconds."""
        deadline = time.monotonic() + seconds
        while any(self.processes[rank].poll() is None for rank in ranks):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def comes(self) -> bool:
        """Whether the rank that is to stay somewhere has come there."""
        deadline = time.monotonic() + _START
        while not (self.folder / 'here').exists():
            if self.wait([0, 1], 0) or time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def texts(self) -> list[str]:
        """What each has printed."""
        return [log.read_text(errors='replace') for log in self.logs]

    def end(self) -> list[int | None]:
        """Ends those that have not ended; returns the statuses, None for those."""
        statuses = [process.poll() for process in self.processes]
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
        return statuses


def prepare(folder: Path) -> tuple[Path, list[list[Place]]]:
    """Goes through every story with no fault.

    Returns:
        The folder of what they left; and for each rank the places that it came to, in order.
    """
    shared = folder / 'shared'
    write_folder(shared / 'images', classes=3, train=16, val=8)
    run_ranks(places_ranks.prepare, 2, folder, shared=shared)
    limits = Trial(KILLED, Place('save', ''), 0).limits()
    for group in (_FIRST, [s for s in STORIES if s not in (*_FIRST, *_THEN)], _THEN):
        runs = {story: Ranks(folder / story, story, shared, limits) for story in group}
        for story, run in runs.items():
            run.wait([0, 1], 120)
            statuses = run.end()
            assert statuses == [0, 0], f'{story}: {statuses}\n' + '\n'.join(run.texts())
            if story in _LEAVE:
                left, name = _LEAVE[story]
                (folder / story / left).rename(shared / name)
    places: list[list[Place]] = [[], []]
    for rank, found in enumerate(places):
        for story in STORIES:
            lines = (folder / story / f'places_{rank}').read_text().splitlines()
            found += [Place(story, line) for line in lines]
    return shared, places


def first_of_each(places: Sequence[Place]) -> list[Place]:
    """Each place once, where it comes first."""
    found: dict[str, Place] = {}
    for place in places:
        found.setdefault(place.what, place)
    return list(found.values())


def trials_of(places: Sequence[Sequence[Place]]) -> list[Trial]:
    """Every fault, on either rank, at each place that it comes to."""
    return [
        Trial(fault, place, victim)
        for victim, own in enumerate(places)
        for place in [*first_of_each(own), *([LATE] if victim == 0 else [])]
        for fault in FAULTS
        if not (place == LATE and fault == CUT)  # as before joining
    ]


# Of those, what is tried always: one fault at each of these, and each fault meets either rank.
CHOSEN = (
    'before joining', 'connected to the store',
    'torch joins', 'torch makes a group', 'start', 'start, inside', 'collective broadcast',
    'save_checkpoint', 'begin save', 'collective barrier', 'write checkpoint',
    'write checkpoint, inside', 'commit', 'commit, inside', 'write checkpoint, save thread',
    'write checkpoint, save thread, inside', 'commit, save thread', 'verify newest', 'verify',
    'load shards', 'evaluation', 'boundary 0.0, preemption thread', 'end of training',
    'last meeting',
)  # fmt: skip
# And these, which torch by itself waits for, the longer or for ever.
_ALSO = (
    ('before joining, late', STOPPED, 0), ('start, inside', KILLED, 1),
    ('start, inside', STOPPED, 0), ('torch joins', CUT, 0),
    ('torch makes a group', KILLED, 1), ('torch makes a group', CUT, 0),
)  # fmt: skip
_TURNS = ((KILLED, 0), (STOPPED, 1), (CUT, 0), (KILLED, 1), (STOPPED, 0), (CUT, 1))


def chosen(trials: Sequence[Trial]) -> list[Trial]:
    """One of each place in `CHOSEN`, so that every fault meets either rank."""
    turns = [(what, *_TURNS[index % len(_TURNS)]) for index, what in enumerate(CHOSEN)]
    turns += _ALSO
    return [t for t in trials if (t.place.what, t.fault, t.victim) in turns]


def measure(trial: Trial, folder: Path, shared: Path, two: hosts.Hosts | None = None) -> Ended:
    """Has a job meet a fault; ``two`` are the hosts of its ranks, needed where they are cut."""
    other = 1 - trial.victim
    late = trial.place == LATE
    seconds, waits_in = math.inf, ''
    with _starting:
        ranks = Ranks(
            folder, trial.place.story, shared, trial.limits(),
            trial.place.name.replace(', late', ''), other if late else trial.victim, two,
        )  # fmt: skip
        came = ranks.comes()
        time.sleep(1.5 if late else 0.3)  # the other one is waiting by now
    try:
        ended = [0, 1] if trial.fault == CUT else [other]
        if trial.fault == CUT:
            assert two is not None
            two.plug(1, False)
        elif came:
            number = signal.SIGKILL if trial.fault == KILLED else signal.SIGSTOP
            os.kill(ranks.processes[trial.victim].pid, number)
        start = time.monotonic()
        if late or trial.fault == CUT:
            (folder / 'go').touch()
        if not came:
            waits_in = _ABSENT
        elif ranks.wait(ended, trial.limit + _PATIENCE):
            seconds = time.monotonic() - start
        else:
            for rank in ended:
                if ranks.processes[rank].poll() is None:
                    os.kill(ranks.processes[rank].pid, signal.SIGUSR2)  # shows its stacks
            time.sleep(0.5)
            waits_in = '; '.join(_waits_in(text) for text in ranks.texts())
    finally:
        statuses = ranks.end()
        if two is not None:
            two.plug(1, True)
    texts = ranks.texts()
    said = _last_words(texts[other])
    names = _names(trial, trial.victim, texts[other], ranks.port)
    if trial.fault == CUT and statuses[trial.victim] != 0:
        names = names and _names(trial, other, texts[trial.victim], ranks.port)
    output = '\n'.join(f'--- rank {r}, {statuses[r]}:\n{text}' for r, text in enumerate(texts))
    return Ended(trial, seconds, statuses, said, names, waits_in, output)


def _names(trial: Trial, missing: int, text: str, port: str) -> bool:
    """Whether a rank said that another one is missing; before they have met, at least where."""
    _, _, said = _last_words(text).partition(' ends the job: ')
    if trial.place.joins and f':{port}' in _last_words(text):
        return True
    if trial.place.may_be_last:
        said = text
    who = rf'rank {missing} on \S+' if trial.fault == KILLED else rf'rank {missing}\b'
    return re.search(who, said) is not None


def _last_words(text: str) -> str:
    lines = text.strip().splitlines() or ['']
    spoken = [
        line for line in lines if re.search(r' ends the job: |^(\[rank|\w+\.)\S*Error: ', line)
    ]
    return (spoken or lines)[-1]


def _waits_in(text: str) -> str:
    """The package's innermost call on each thread's stack, as faulthandler prints them."""
    found = []
    for stack in re.split(r'\n(?=Thread|Current thread)', text)[1:]:
        calls = re.findall(r'internvl_ds/(\S+)", line (\d+) in (\S+)', stack)
        if calls and 'liveness' not in calls[0][0]:
            found.append('{} line {} in {}'.format(*calls[0]))
    return ', '.join(found)


def measure_all(
    folder: Path, shared: Path, trials: Sequence[Trial], at_once: int = 16
) -> list[Ended]:
    """So many jobs at a time: starting takes the CPU, and the rest of one is waiting."""
    folder.mkdir(exist_ok=True)
    pairs: queue.SimpleQueue[hosts.Hosts] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(at_once) as pool:
        cuts = sum(trial.fault == CUT for trial in trials)
        for index in range(min(cuts, _HOST_PAIRS)):
            pairs.put(stack.enter_context(hosts.Hosts(2, folder / f'pair_{index}')))

        def one(numbered: tuple[int, Trial]) -> Ended:
            index, trial = numbered
            two = pairs.get() if trial.fault == CUT else None
            try:
                ended = measure(trial, folder / f'trial_{index}', shared, two)
                if ended.waits_in == _ABSENT:  # another program may have got its port
                    ended = measure(trial, folder / f'trial_{index}_again', shared, two)
            finally:
                if two is not None:
                    pairs.put(two)
            return ended

        return list(pool.map(one, enumerate(trials)))


def table(ended: Sequence[Ended]) -> str:
    """In Markdown; what is not as it must be is in bold."""
    words = {
        KILLED: 'is killed (SIGKILL)', STOPPED: 'stands still (SIGSTOP)', CUT: 'is cut off',
    }  # fmt: skip
    head = '| rank | at | of the story | launcher | seconds | limit | exit status | says |'
    lines = [head, f'|{" --- |" * 8}']
    for cell in ended:
        trial, mark = cell.trial, '' if cell.is_right() else '**'
        says = (cell.waits_in or cell.says).replace('|', '\\|')[:200]
        cells = [
            f'{trial.victim} {words[trial.fault]}',
            trial.place.what,
            trial.place.story,
            'none',
            f'{mark}{cell.seconds:.1f}{mark}',
            f'{trial.limit:.0f}',
            str(cell.statuses[1 - trial.victim]),
            f'{"" if cell.is_right() or cell.names else "**names nobody:** "}`{says}`',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)
