"""One trial: a process group of its own, a time limit, and nothing left of it afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from internvl_ds.files import open_own
from internvl_ds.files.reading import read_json
from internvl_ds.tools.doctor.shm import remove_buffers
from internvl_ds.tools.tune.records import CRASH, HANG, MEMORY, OK

# In the environment of every process of a trial: the trial's folder.
MARK = 'INTERNVL_DS_TRIAL'

_GRACE = 5.0  # seconds between SIGTERM and SIGKILL
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL, 256 - signal.SIGKILL)
_LONGEST = 300  # characters of the error in a row

# What the allocators of torch, CUDA, numpy, C++ and the system say.
_MEMORY_WORDS = re.compile(
    r'out[ _]of[ _]memory|OutOfMemory|Cannot allocate memory|can\'t allocate memory'
    r'|DefaultCPUAllocator|MemoryError|Unable to allocate|bad_alloc|failed to map segment'
    r'|oom[-_ ]kill|ALLOC_FAILED|cudaErrorMemoryAllocation|Failed to CUDA (host )?(m|c)alloc',
    re.IGNORECASE,
)
# How launchers tell that a rank got SIGKILL: by the kernel, where nobody else did.
_KILL_WORDS = re.compile(
    r'exits with return code = -9\b|exitcode\s*: -9\b|signal 9\b|EXIT CODE: 9\b|\b\d+ Killed\b',
    re.IGNORECASE,
)
_LAST_WORDS = re.compile(r'rank \d+ on \S+ ends the job: ')
_ERROR_LINE = re.compile(r'^(\[[^]]*\]:? *)?(\w+\.)*\w*(Error|Exception)\b.*|.*\berror: .*', re.I)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    status: str  # OK, MEMORY, CRASH or HANG of `records`
    seconds: float  # from start to end
    # what bench.json held; empty unless the status is OK
    bench: dict[str, Any] = field(default_factory=dict)
    error: str = ''  # the line of the log that says why, unless the status is OK


def run_trial(
    command: Sequence[str], folder: Path, limit: float, port: int | None = None
) -> Outcome:
    """Runs a trial to its end, on every path; on other hosts the launcher ends its processes.

    Args:
        command: what to run, in the present directory.
        folder: of the trial; log.txt is written there, and out/**/bench.json is looked for.
        limit: seconds after which it counts as hanging.
        port: of rank 0 where it is known.
    """
    # The launch scripts write beside this file, by default in the present directory.
    variables = {MARK: str(folder), 'INTERNVL_DS_RESULT': str(folder / 'result')}
    log, start = folder / 'log.txt', time.monotonic()
    with os.fdopen(open_own(log, os.O_TRUNC), 'wb') as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            env={**os.environ, **variables}, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process, folder, port)
    seconds = time.monotonic() - start
    text = log.read_text(encoding='utf-8', errors='replace')
    bench = next(folder.glob('out/**/bench.json'), None)
    status = classify(code, text, bench is not None)
    if status == OK and bench is not None:
        try:
            return Outcome(OK, seconds, _measured(bench))
        except (OSError, ValueError, LookupError, TypeError) as reason:
            return Outcome(CRASH, seconds, error=f'{bench}: cannot be read: {reason}')
    error = error_line(text)
    if status == HANG:
        error = f'no end within {limit:.0f} s; last line: {error}'
    elif code == 0:
        error = f'it returned 0, but there is no bench.json below {folder}; last line: {error}'
    return Outcome(status, seconds, error=error)


def _measured(path: Path) -> dict[str, Any]:
    tree = read_json(path, ours=True)
    float(tree['images_per_s'])
    return tree


def classify(code: int | None, log: str, measured: bool) -> str:
    """How a trial ended. Pure.

    Args:
        code: the launcher's exit status; None where the time limit ended it.
        log: all that it wrote.
        measured: whether bench.json is there.
    """
    if code is None:
        return HANG
    if code == 0 and measured:
        return OK
    if _MEMORY_WORDS.search(log) or code in _KILLED or _KILL_WORDS.search(log):
        return MEMORY
    return CRASH


def error_line(log: str) -> str:
    """The line of a log that best explains a failure, else its last line. Pure."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last_words = [_LAST_WORDS.sub('', line) for line in lines if _LAST_WORDS.search(line)]
    memory = [line for line in reversed(lines) if _MEMORY_WORDS.search(line)]
    errors = [line for line in reversed(lines) if _ERROR_LINE.search(line)]
    best_first = [*last_words, *memory, *errors, *reversed(lines), 'nothing was written']
    return best_first[0][:_LONGEST]


def end(process: subprocess.Popen | None, folder: Path, port: int | None = None) -> None:
    """Ends a trial's processes on this host, by SIGTERM and then by SIGKILL.

    Args:
        process: the launcher, where this process started it.
        folder: of the trial, or one that holds trials: all below it are meant.
        port: of rank 0 where it is known.
    """
    ports = {str(port)} if port is not None else set()
    deadline = time.monotonic() + _GRACE
    number: signal.Signals | None = signal.SIGTERM
    while True:
        marked = _marked(folder)
        ports |= {environ['MASTER_PORT'] for environ in marked.values() if 'MASTER_PORT' in environ}
        alive = process is not None and process.poll() is None
        if not marked and not alive:
            break
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        if number is not None:  # SIGTERM once: a second one may cut short what the first began
            _send(number, process, list(marked))
            number = None
        time.sleep(0.1)
    _send(signal.SIGKILL, process, [])
    for each in ports:
        remove_buffers(each)


def _send(number: signal.Signals, process: subprocess.Popen | None, pids: Sequence[int]) -> None:
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _marked(folder: Path) -> dict[int, Mapping[str, str]]:
    """The processes of the trials in ``folder``, zombies left out, and their environments."""
    # None: another user's
    processes = {p.pid: p.info['environ'] or {} for p in psutil.process_iter(['environ'])}
    return {
        pid: environ
        for pid, environ in processes.items()
        if MARK in environ and Path(environ[MARK]).is_relative_to(folder)
    }
