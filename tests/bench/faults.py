"""Every launcher meets every fault, at any place: seconds to the end of the job, and what it says.

    python -m tests.bench.faults [--out FOLDER] [--only FAULT ...] [--places REGEX] [--quick]

prints two Markdown tables. For the first (`tests.bench.places`) there is no launcher, and every
place of every rank is tried. For the second, real jobs of the launch scripts train until something
happens to them, or a rank of theirs is at a place. Needs root for the rows with two hosts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from internvl_ds.dist.network import free_port
from tests.bench import places
from tests.harness import hosts, mpich, slurm
from tests.harness.ranks import (
    ROOT,
    base_env,
    processes_with,
    remove_shm_buffers,
    wait_for_words,
)
from tests.harness.shared_memory import remove_unused, shared_files
from tests.harness.starts import start_command
from tests.harness.training import small_config, write_folder

LIMIT = 10  # every limit, seconds; COMM.INIT_TIMEOUT too where ranks are to miss each other
# A launcher needs up to 30 s more to end ranks by force, and starting takes some.
WORST = 120.0

# Starting takes the CPU, and the rest of a cell is waiting.
_starting = threading.Semaphore(2)
_AT_ONCE = 4

LAUNCHERS = ('deepspeed', 'Open MPI', 'MPICH', 'Slurm', 'torchrun')
FAULTS = {
    'killed': 'a rank is killed (SIGKILL)',
    'crashed': 'a rank raises an exception',
    'stopped': 'a rank stands still (SIGSTOP)',
    'cut': 'the link to a host is cut',
    'unreachable': 'rank 0 cannot be reached',
    'hostfile': 'the hostfile names a host that does not exist',
}
ON_TWO_HOSTS = ('cut', 'unreachable', 'hostfile')
# Slurm is tried on one host, torchrun has no hostfile, and deepspeed itself decides who is rank 0.
CELLS = [
    (fault, launcher)
    for fault in FAULTS
    for launcher in LAUNCHERS
    if not (fault in ON_TWO_HOSTS and launcher in ('Slurm', 'torchrun'))
    and (fault, launcher) != ('unreachable', 'deepspeed')
]

# Of `tests.harness.places`, in the training program: where rank 1, or 0, is when it is met.
_PLACES = ('find newest #1', 'evaluation #1', 'write checkpoint #1', 'end of training #1')
AT_PLACES = [
    (f'{fault} at {place}', launcher)
    for place in _PLACES
    for fault in ('killed', 'stopped')
    for launcher in LAUNCHERS
    if launcher != 'Slurm'
]
# With QUICK, below, each launcher meets a fault; the others, and on two hosts, under --soak.
QUICK_CELLS = [
    ('killed', 'Open MPI'),
    ('crashed', 'deepspeed'),
    ('stopped', 'MPICH'),
    ('cut', 'Open MPI'),
]

# Places that a script has not, which places.py tries.
QUICK = [
    ('killed at evaluation #1', 'torchrun'),
]


@dataclass(frozen=True)
class Cell:
    """How a job ended.

    Attributes:
        seconds: from the fault, or the start where the ranks never meet, to the end of the script;
            infinite where it did not even train before.
        status: the script's exit status; None where it had to be ended.
        says: the line that names what happened.
        left: processes that were left, by name.
        output: all that the job printed.
    """

    launcher: str
    fault: str
    seconds: float
    status: int | None
    says: str
    left: list[str]
    output: str


class Job:
    """A job that runs into a fault, on hosts of its own where that takes two."""

    def __init__(
        self, folder: Path, env: dict[str, str] | None = None, two: hosts.Hosts | None = None
    ) -> None:
        self.folder, self.env, self.hosts = folder, env or {}, two

    def measure(self, launcher: str, fault: str) -> Cell:
        """Runs it."""
        folder = self.folder
        data = write_folder(folder / 'images', classes=3, train=16, val=8)
        cfg = folder / 'small.yaml'
        asked, (fault, _, place) = fault, fault.partition(' at ')
        never_meet = fault in ('unreachable', 'hostfile')
        limits = {
            'COMM__TIMEOUT': LIMIT, 'COMM__INIT_TIMEOUT': LIMIT if never_meet else 120,
            'CHECKPOINT__RENDEZVOUS_TIMEOUT': LIMIT if place else 60,
            'CHECKPOINT__IO_TIMEOUT': LIMIT if place else 1800,
        }  # fmt: skip
        cfg.write_text(
            small_config(
                data, TRAIN__EPOCHS=1 if place else 100000, TRAIN__WARMUP_EPOCHS=0,
                DATA__BATCH_SIZE=2, SAVE_FREQ=100000,
                MODEL__FACTORY=f'tests.harness.{"places" if place else "faulty"}:model', **limits,
            ).dump()
        )  # fmt: skip
        (folder / 'plan.json').write_text(json.dumps({'place': place, 'stays': 1}))
        port = str(free_port())
        two = fault in ON_TWO_HOSTS
        command = self._script(launcher, fault, folder, port)
        command += ['--cfg', str(cfg), '--output', str(folder)]
        if two:
            assert self.hosts is not None
            command = self.hosts.command(0, command, folder)
        env = base_env(INTERNVL_DS_GRACE=str(LIMIT), INTERNVL_DS_RESULT=str(folder / 'result'))
        env.update(self.env)
        if fault == 'unreachable':
            env.update(MASTER_ADDR='10.99.0.77', MASTER_PORT=port)
        log = folder / 'log'
        with _starting:
            with log.open('wb') as output:
                job = subprocess.Popen(
                    command, env=env, cwd=ROOT if launcher == 'Slurm' else folder,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )  # fmt: skip
            start = time.monotonic()
            try:
                ready = self._wait_until_ready(never_meet, place, log, job)
            except BaseException:
                self._clean(folder, two)
                raise
        try:
            if ready and not never_meet:
                start = time.monotonic()
                self._inflict(fault, data)
            try:
                status: int | None = job.wait(WORST)
            except subprocess.TimeoutExpired:
                status = None
            seconds = time.monotonic() - start if ready else math.inf
            left = self._left(folder, two)
        finally:
            self._clean(folder, two)
            job.wait(30)
            remove_shm_buffers(port)
        text = log.read_text(errors='replace')
        return Cell(launcher, asked, seconds, status, _says(text), left, text)

    def _wait_until_ready(
        self, never_meet: bool, place: str, log: Path, job: subprocess.Popen
    ) -> bool:
        """Whether the job is where the fault is to meet it."""
        if never_meet:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(20)  # what starts is through with its imports by then
            return True
        if not place:
            return wait_for_words('epoch 1:', log, 180, job)
        return wait_for_words('', self.folder / 'here', 180, job)

    def _script(self, launcher: str, fault: str, folder: Path, port: str) -> list[str]:
        if launcher == 'Slurm':
            options = ['--wait', '--nodes=1', '--ntasks-per-node=2', '--gpus-per-node=0']
            options += ['--time=30', f'--output={folder}/log']
            return ['sbatch', *options, str(ROOT / 'launch' / 'train_slurm.sbatch'), '--']
        if fault not in ON_TWO_HOSTS:
            return start_command(launcher, 2, port)
        assert self.hosts is not None
        hostfile = self.hosts.hostfile_for(launcher)
        if fault == 'hostfile':
            wrong = folder / 'hostfile'
            wrong.write_text(hostfile.read_text().replace('host1', 'nowhere'))
            hostfile = wrong
        return start_command(launcher, 4, port, hostfile)

    def _inflict(self, fault: str, data: Path) -> None:
        if fault == 'crashed':
            (data / 'crash').touch()
        elif fault == 'cut':
            assert self.hosts is not None
            self.hosts.plug(1, False)
        else:
            here = self.folder / 'here'
            pid = here.read_text() if here.exists() else (data / 'pid_1').read_text().split()[1]
            os.kill(int(pid), signal.SIGKILL if fault == 'killed' else signal.SIGSTOP)

    def _left(self, folder: Path, two: bool) -> list[str]:
        # What was told to end may need a moment; ranks that are cut off end by their own limits.
        deadline = time.monotonic() + (60 if two else 5)
        while True:
            left = []
            for pid in self._processes(folder, two):
                with contextlib.suppress(FileNotFoundError):
                    left.append(Path(f'/proc/{pid}/comm').read_text().strip())
            if set(left) <= set(_STAY) or time.monotonic() > deadline:
                return left
            time.sleep(0.2)

    def _processes(self, folder: Path, two: bool) -> list[int]:
        if two:
            assert self.hosts is not None
            return [pid for host in range(2) for pid in self.hosts.processes(host)]
        return processes_with(str(folder))

    def _clean(self, folder: Path, two: bool) -> None:
        for pid in self._processes(folder, two):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if two and self.hosts is not None:
            self.hosts.plug(1, True)


# MPICH's daemon on a host that is cut off, and ssh to it, stay until TCP gives up.
_STAY = ('hydra_pmi_proxy', 'ssh')

# What to quote of a job's output: the first of these that is found.
_TELLING = (
    r'rank \d+ on \S+ ends the job: .*',
    r'noticed that (process rank .* exited on\s+signal .*)',
    r'=\s+(PID \d+ RUNNING AT .*\s+=\s+EXIT CODE: .*)',
    r'ssh: Could not resolve hostname .*',
    r'lost communication with a remote daemon[^.]*',
    r'srun: error: (.*: task \d+: .*)',
    r'rank\s+: \d+ .*\s+exitcode\s+: .*',
)


def _says(text: str) -> str:
    for pattern in _TELLING:
        found = re.findall(pattern, text)
        if found:
            return ' '.join(str(found[0]).split())
    return text.strip().splitlines()[-1] if text.strip() else ''


def measure_all(
    folder: Path, asked: Sequence[tuple[str, str]], at_places: Sequence[tuple[str, str]] = ()
) -> list[Cell]:
    """Those of the cells that can be tried here, and those of ``at_places``.

    A machine with other work is slow: what took too long is tried once more, with nothing beside
    it.
    """
    cells = [(fault, launcher) for fault, launcher in asked if why_not(fault, launcher) is None]
    cells += at_places
    with_mpich = any(launcher == 'MPICH' for _, launcher in cells)
    mpich_env = mpich.make_environment(folder) if with_mpich else {}

    def measure(cell: tuple[str, str], again: str = '') -> Cell:
        fault, launcher = cell
        own = folder / f'{launcher}-{fault}{again}'.replace(' ', '_').replace('#', '')
        env = mpich_env if launcher == 'MPICH' else {}
        if fault in ON_TWO_HOSTS:
            with hosts.Hosts(2, own) as two:
                return Job(own, env, two).measure(launcher, fault)
        if launcher == 'Slurm':
            with slurm.Slurm(folder / f'cluster_of_{own.name}') as cluster:
                env = {name: cluster.env[name] for name in ('SLURM_CONF', 'PATH')}
                return Job(own, env).measure(launcher, fault)
        return Job(own, env).measure(launcher, fault)

    # Several Slurms do not get on with each other on one host.
    with ThreadPoolExecutor(_AT_ONCE) as pool, ThreadPoolExecutor(1) as one_by_one:
        futures = {
            cell: (one_by_one if cell[1] == 'Slurm' else pool).submit(measure, cell)
            for cell in reversed(cells)  # those that take longest come first
        }
        ended = [futures[cell].result() for cell in cells]
    slow = [index for index, cell in enumerate(ended) if cell.seconds >= WORST]
    for index in slow:
        ended[index] = measure(cells[index], '-again')
    return ended


def why_not(fault: str, launcher: str) -> str | None:
    """What is missing to try a cell here; None where it can be tried."""
    if fault in ON_TWO_HOSTS:
        return hosts.why_not()
    return slurm.why_not() if launcher == 'Slurm' else None


def table(cells: list[Cell]) -> str:
    """The cells in Markdown."""
    head = '| fault | at | launcher | seconds | limit | exit status | says |'
    lines = [head, f'|{" --- |" * 7}']
    for cell in cells:
        says = cell.says.replace('|', '\\|')[:160]
        fault, _, place = cell.fault.partition(' at ')
        lines.append(
            f'| {FAULTS[fault]} | {place.rpartition(" #")[0] or "training"} | {cell.launcher} | '
            f'{cell.seconds:.0f} | {WORST:.0f} | {cell.status} | `{says}` |'
        )
    return '\n'.join(lines)


def main() -> None:
    """Prints the table, and keeps what the jobs printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else '')
    parser.add_argument('--out', type=Path, help='folder for what the jobs print')
    parser.add_argument('--only', nargs='*', choices=FAULTS, default=list(FAULTS))
    parser.add_argument('--places', default='', help='of those without a launcher: a pattern')
    parser.add_argument('--quick', action='store_true', help='at places: what CI tries')
    args = parser.parse_args()
    before = shared_files()
    with tempfile.TemporaryDirectory(prefix='faults-') as name:
        folder = Path(name)
        shared, found = places.prepare(folder / 'places')
        trials = places.trials_of(found)
        trials = places.chosen(trials) if args.quick else trials
        trials = [trial for trial in trials if re.search(args.places, trial.place.name)]
        ended = places.measure_all(folder / 'places', shared, trials)
        # A machine with other work is slow: what is not right is tried again, with less beside it.
        wrong = {index: cell.trial for index, cell in enumerate(ended) if not cell.is_right()}
        again = places.measure_all(folder / 'again', shared, list(wrong.values()), at_once=3)
        for index, cell in zip(wrong, again, strict=True):
            ended[index] = cell
        print(places.table(ended), end='\n\n', flush=True)
        at_places = QUICK if args.quick else AT_PLACES
        asked = [cell for cell in CELLS if cell[0] in args.only]
        cells = measure_all(folder, asked, at_places if args.only else ())
    remove_unused(before, young=0)
    outputs = {f'{cell.launcher}-{cell.fault}': cell.output for cell in cells}
    outputs |= {
        f'{e.trial.fault} {e.trial.victim} at {e.trial.place.name}': e.output for e in ended
    }
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for what, output in outputs.items():
            (args.out / f'{what}.txt').write_text(output)
    print(table(cells))
    left = sum(not cell.is_right() for cell in ended)
    print(
        f'{left} of {len(ended)} at places are not as they must be; {len(again)} were tried again'
    )


if __name__ == '__main__':
    main()
