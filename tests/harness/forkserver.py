"""Processes that have imported all that ranks need, and fork them: an import takes five seconds.

    process = fork('rank 2', ['tests.engine.stepping:follow_reference', '/tmp/x'], env, log, cwd)

Each rank number gets a parent of its own, so that hash seeds and addresses differ between the ranks
of a job, as they do between real ones. A rank starts with one thread and no process group, in a
session of its own, and ends as any program does.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PRELOADED = (
    'internvl_ds.utils',
    'internvl_ds.engine.ema',
    'internvl_ds.train.loop',
    'matplotlib.backends.backend_agg',
    # What DeepSpeed imports when it makes an engine, torch's compiler with it.
    'deepspeed.module_inject.auto_ep_config',
    'deepspeed.runtime.zero.stage3',
    'deepspeed.runtime.zero.stage_1_and_2',
)

_parents: dict[str, subprocess.Popen] = {}

# Held for a question and its answer.
_asking = threading.Lock()


class Forked:
    """A rank, with what is needed of `subprocess.Popen`."""

    def __init__(self, pid: int, parent: subprocess.Popen) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._parent = parent

    def poll(self) -> int | None:
        """The exit status, negative for a signal's number; None while it runs."""
        if self.returncode is None:
            self.returncode = _ask(self._parent, {'poll': self.pid})
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Waits for the end.

        Raises:
            subprocess.TimeoutExpired: when it does not come within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return status


def preload() -> None:
    """Imports what ranks import in their course, for processes that are about to be forked."""
    for name in _PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):  # of another version of DeepSpeed
            importlib.import_module(name)
    from internvl_ds.config.ds.schema import installed
    from internvl_ds.zero.muon.deferred import import_muon

    import_muon()
    installed()  # read once, not by each rank: half a second
    gc.freeze()  # or every collection in a fork goes through all of these modules


def fork(
    name: str,
    words: list[str],
    env: dict[str, str],
    log: Path,
    cwd: Path,
    python: str,
    main: str = 'tests.harness.ranks:main',
) -> Forked:
    """Starts the program of a rank, ``main(*words)``, as a fork. Any thread may call it.

    Args:
        name: of the parent, which is started with ``env`` where there is none of that name.
        words: the program's arguments.
        env: its whole environment.
        log: takes standard output and error.
        cwd: its directory.
        python: the interpreter of a parent that is started.
        main: module and function.
    """
    with _asking:
        parent = _parents.get(name)
        if parent is None or parent.poll() is not None:
            parent = _parents[name] = _start(env, cwd, python)
    request = {'words': words, 'env': env, 'log': str(log), 'cwd': str(cwd), 'main': main}
    return Forked(_ask(parent, request), parent)


def _start(env: dict[str, str], cwd: Path, python: str) -> subprocess.Popen:
    parent = subprocess.Popen(
        [python, '-m', 'tests.harness.forkserver'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
        cwd=cwd,
        start_new_session=True,
        text=True,
    )
    atexit.register(_stop, parent)
    return parent


def _stop(parent: subprocess.Popen) -> None:
    assert parent.stdin is not None
    parent.stdin.close()  # it ends when nobody can ask any more, also where this process was killed
    parent.wait(timeout=30)


def _ask(parent: subprocess.Popen, request: dict[str, Any]) -> Any:
    assert parent.stdin is not None
    assert parent.stdout is not None
    with _asking:
        parent.stdin.write(json.dumps(request) + '\n')
        parent.stdin.flush()
        answer = parent.stdout.readline()
    if not answer:
        raise RuntimeError(f'the process that forks ranks has ended (exit {parent.wait(30)})')
    return json.loads(answer)


def _serve() -> dict[str, Any]:
    """Answers until nobody asks; returns in a fork only, with what it was asked for."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what imports print is no answer
    preload()
    for line in sys.stdin:
        request = json.loads(line)
        if 'poll' in request:
            pid, status = os.waitpid(request['poll'], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        answers.write(json.dumps(answer) + '\n')
        answers.flush()
    sys.exit(0)


def _become(request: dict[str, Any]) -> Callable[..., object]:
    """Has the fork be the process that was asked for; returns what it is to do."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request['log'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    # The pipe of answers, and what modules have opened. They are not closed: an object that closes
    # its own later would close what has its number by then, such as the store's, which then hangs.
    for descriptor in map(int, os.listdir('/proc/self/fd')):
        if descriptor > 2:
            with contextlib.suppress(OSError):  # that of the list
                os.fstat(descriptor)
                os.dup2(nothing, descriptor, inheritable=False)
    os.environ.clear()
    os.environ.update(request['env'])
    os.chdir(request['cwd'])
    module, _, name = request['main'].partition(':')
    sys.argv = [module, *request['words']]
    return getattr(importlib.import_module(module), name)


if __name__ == '__main__':
    _become(_serve())(*sys.argv[1:])
