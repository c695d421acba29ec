"""Runs a test function on real ranks: processes of their own, a free port, and a time limit.

    results = run_ranks(stepping.follow_reference, 2, tmp_path, stage=3)

The function runs on every rank with the process group up, gets the keyword arguments (plain JSON
values) and returns a JSON value; `run_ranks` returns these in rank order. When a rank fails, or the
limit is reached, the others are ended and the test fails with the output of each rank.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from internvl_ds.dist.network import free_port
from tests.harness.forkserver import Forked, fork

ROOT = Path(__file__).parents[2]

# A rank whose peer has failed gets this long to fail by itself and say why.
_GRACE = 15.0


# A folder with a package of another version than the environment's: see test_versions.py.
BESIDE = 'INTERNVL_DS_BESIDE'
# Of ranks: 'fake' for the device of tests/harness/device; 'own' for what DeepSpeed finds by itself,
# such as a GPU; else a CPU.
DEVICE = 'INTERNVL_DS_TEST_DEVICE'


class RankFailed(AssertionError):
    """A rank exited non-zero or was ended; holds what each rank printed."""


class Job(NamedTuple):
    """How a command ended: exit status and output, standard error included."""

    returncode: int
    output: str


def base_env(**more: str) -> dict[str, str]:
    """The environment of test processes: CPU ranks, one thread each, the source tree importable."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(('OMPI_', 'PMI_', 'SLURM_'))}
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        env.pop(name, None)
    path = [str(Path(sys.executable).parent), env.get('PATH', '')]
    beside = os.environ.get(BESIDE)
    env.update(
        PATH=os.pathsep.join(path),
        PYTHONPATH=os.pathsep.join([*filter(None, [beside]), str(ROOT)]),
        PYTHONUNBUFFERED='1',
        OMP_NUM_THREADS='1',
        DS_ACCELERATOR='cpu',
        # Environments that share the default directory rebuild each other's ops again and again.
        TORCH_EXTENSIONS_DIR=str(Path(beside or sys.prefix) / 'torch_extensions'),
        CUDA_VISIBLE_DEVICES='',
    )
    if env.get(DEVICE) == 'own':
        del env['DS_ACCELERATOR']
        env.pop('CUDA_VISIBLE_DEVICES')
        env |= {k: v for k, v in os.environ.items() if k == 'CUDA_VISIBLE_DEVICES'}
    env.update(more)
    return env


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    folder: Path,
    /,
    timeout: float = 240,
    env: dict[str, str] | None = None,
    expect_failure: bool = False,
    grace: float = _GRACE,
    python: str = sys.executable,
    **kwargs: Any,
) -> list[Any]:
    """Runs a function on ``ranks`` processes and returns what each returned.

    Args:
        function: of a module; it runs with the process group initialised.
        ranks: world size.
        folder: where outputs go; usually tmp_path.
        timeout: seconds until the whole job is ended.
        env: further environment variables, in time for what imports read of them.
        python: the interpreter, of an environment that has the packages.
        expect_failure: return each rank's output (text) instead of raising when ranks fail.
        grace: seconds that the others get, when a rank has failed, to fail by themselves.
        **kwargs: passed to the function; JSON values and paths.
    """
    target = _name_of(function)
    port = str(free_port())
    work = folder / f'ranks-{port}'
    work.mkdir(parents=True)
    (work / 'kwargs.json').write_text(json.dumps(kwargs, default=str))
    processes, logs = [], []
    for rank in range(ranks):
        logs.append(work / f'rank_{rank}.log')
        # Without LOCAL_SIZE DeepSpeed makes no shared-memory buffers that outlive the job.
        variables = base_env(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port,
            **(env or {}),
        )
        parent = f'rank {rank} {sorted((env or {}).items())} {python}'
        processes.append(fork(parent, [target, str(work)], variables, logs[-1], ROOT, python))
    reason = _wait(processes, timeout, grace)
    _end(processes)
    remove_shm_buffers(port)
    texts = [log.read_text(errors='replace') for log in logs]
    codes = [p.returncode for p in processes]
    if expect_failure:
        return texts
    if any(codes):
        shown = '\n'.join(
            f'--- rank {r}, exit {code}:\n{text[-6000:]}'
            for r, (code, text) in enumerate(zip(codes, texts, strict=True))
        )
        raise RankFailed(f'{target} on {ranks} ranks: {reason}\n{shown}')
    return [json.loads((work / f'result_{r}.json').read_text()) for r in range(ranks)]


def _name_of(function: Callable[..., Any]) -> str:
    module = sys.modules[function.__module__]
    spec = module.__spec__  # of a program that was started with -m its name is __main__ otherwise
    return f'{spec.name if spec else module.__name__}:{function.__name__}'


def run_command(
    command: list[str], timeout: float, env: dict[str, str] | None = None, cwd: Path = ROOT
) -> Job:
    """Runs a command in a process group of its own; ends the whole group at the limit.

    A launcher that takes ``--master_port`` has its shared-memory buffers removed afterwards.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=base_env(**(env or {})),
        cwd=cwd,
        start_new_session=True,
        text=True,
        errors='replace',
    )
    try:
        output = _communicate(process, timeout)
    finally:
        _end([process])
        if '--master_port' in command:
            remove_shm_buffers(command[command.index('--master_port') + 1])
    return Job(process.returncode, output)


def _communicate(process: subprocess.Popen, timeout: float) -> str:
    """The output of a process, which is ended at the limit.

    What it has started and left may hold its output open: that is waited for a little only.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return process.communicate(timeout=min(1.0, timeout))[0]
        except subprocess.TimeoutExpired as error:
            if process.poll() is not None:
                deadline = min(deadline, time.monotonic() + _GRACE)
            if time.monotonic() > deadline:
                _end([process])
                output = error.output or b''  # bytes, whatever the process was opened with
                return output.decode(errors='replace') + f'\n[ended after {timeout:g} s]'


def wait_for_words(
    words: str, log: Path, seconds: float, job: subprocess.Popen | None = None
) -> bool:
    """Whether a log comes to hold these words, before the time is over or the job has ended."""
    deadline = time.monotonic() + seconds
    while not log.exists() or words not in log.read_text(errors='replace'):
        if time.monotonic() > deadline or (job is not None and job.poll() is not None):
            return False
        time.sleep(0.1)
    return True


def processes_with(words: str) -> list[int]:
    """The processes in whose command lines these words are."""
    found = subprocess.run(['pgrep', '-f', words], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def remove_shm_buffers(port: str) -> None:
    """Removes what DeepSpeed's CPU all-reduce leaves in /dev/shm for a job's port."""
    for path in Path('/dev/shm').glob(f'deepspeed_allreduce_buffer_*_{port}_*'):
        path.unlink(missing_ok=True)


def _wait(processes: list[Forked], timeout: float, grace: float) -> str:
    deadline = time.monotonic() + timeout
    failed_at = None
    while any(p.poll() is None for p in processes):
        now = time.monotonic()
        if now > deadline:
            return f'ended after {timeout:g} s'
        if failed_at is None and any(p.poll() for p in processes):
            failed_at = now
        if failed_at is not None and now > failed_at + grace:
            return f'a rank failed, and the others were ended {grace:g} s later'
        time.sleep(0.05)
    return 'a rank failed'


def _end(processes: Sequence[subprocess.Popen | Forked]) -> None:
    """Ends each process's group, the children that it left behind included."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def main(target: str, folder: str) -> None:
    """What a rank does: joins the others, runs the function, leaves its result, and leaves."""
    import deepspeed

    from internvl_ds.dist.process_group import init_distributed, leave
    from internvl_ds.dist.rendezvous import rank

    if os.environ.get('TESTS_WITHOUT_SHM_OP'):  # see tests/harness/pythons.py
        deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False
    if os.environ.get(DEVICE) == 'fake':
        from tests.harness.device import accelerator

        accelerator.install()
    module, _, name = target.partition(':')
    work = Path(folder)
    kwargs = json.loads((work / 'kwargs.json').read_text())
    init_distributed()
    own = rank()
    result = getattr(importlib.import_module(module), name)(**kwargs)
    (work / f'result_{own}.json').write_text(json.dumps(result))
    leave()
