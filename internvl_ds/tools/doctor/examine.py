"""Runs each probe in a process with a limit: a hang or crash is a line of the result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from internvl_ds.tools.doctor.probe_result import ProbeResult, fault
from internvl_ds.tools.doctor.probes import PROBES, Probe

_AS_WELL = 'a run needs the same, and would '


class _Run:
    """A running probe. It prints to memory: no full pipe or disk can block it."""

    def __init__(self, name: str, probe: Probe, output: Path) -> None:
        self._name, self._seconds = name, probe.seconds
        self._deadline = time.monotonic() + probe.seconds
        self._process: subprocess.Popen | None = None
        self._failure = ''
        try:
            self._out, self._err = os.memfd_create('answers'), os.memfd_create('errors')
            words = [sys.executable, '-m', 'internvl_ds.tools.doctor', name, str(output)]
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._failure = str(error)

    def results(self) -> list[ProbeResult]:
        """Waits for its end, or ends it at its limit."""
        if self._process is None:
            text = f'no process can be started: {self._failure}'
            return [fault(self._name, text, f'{_AS_WELL}fail: it starts many')]
        try:
            status = self._process.wait(timeout=max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            text = f'no answer within {self._seconds:g} s'
            return [fault(self._name, text, f'{_AS_WELL}hang')]
        finally:
            self.end()
        answers, errors = _take(self._out), _take(self._err)
        try:
            if status == 0:
                return [ProbeResult(**fields) for fields in json.loads(answers)]
        except (ValueError, TypeError) as error:
            errors = f'{answers[:200]!r} is no answer: {error}'
        last = (errors.strip().splitlines() or ['without a word'])[-1][:200]
        names = {number.value: number.name for number in signal.Signals}
        how = 'failed' if status > 0 else f'died of {names.get(-status, f"signal {-status}")}'
        more = f'All it said: {sys.executable} -m internvl_ds.tools.doctor {self._name!r} .'
        return [fault(self._name, f'the probe {how}: {last}', f'{_AS_WELL}fail. {more}')]

    def end(self) -> None:
        """Kills it with its children. It is not waited for: on a dead file system it stays."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):  # all of it has ended
                os.killpg(process.pid, signal.SIGKILL)


def examine(output: Path) -> list[ProbeResult]:
    """All results, in the order of `PROBES`.

    The slow ones begin first, the others run meanwhile one by one, and what is timed comes last.
    """
    slow = {name: _Run(name, p, output) for name, p in PROBES.items() if p.slow}
    results = {}
    try:
        for name, probe in PROBES.items():
            if not probe.slow and not probe.of_output:
                results[name] = _Run(name, probe, output).results()
        for name, run in slow.items():
            results[name] = run.results()
    finally:
        for run in slow.values():
            run.end()
    for name, probe in PROBES.items():
        if probe.of_output:
            results[name] = _Run(name, probe, output).results()
    return [result for name in PROBES for result in results[name]]


def _take(descriptor: int) -> str:
    with os.fdopen(descriptor, 'rb') as file:
        file.seek(0)
        return file.read().decode(errors='replace')
