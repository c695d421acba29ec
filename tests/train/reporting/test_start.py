"""The clock of a start. No ranks; the line in a run's log is tests/train/test_loop.py's."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_ds.train.reporting import start
from internvl_ds.train.reporting.start import StartClock
from tests.harness.ranks import ROOT, base_env


def told(clock, caplog):
    with caplog.at_level(logging.INFO):
        clock.tell(logging.getLogger('test'))
    return caplog.messages[-1]


def test_it_begins_with_the_process_and_not_with_the_first_call():
    code = (
        'import logging, sys, time; time.sleep(0.5); before = time.monotonic(); '
        'from internvl_ds.train.reporting.start import StartClock; clock = StartClock(); '
        'clock.passed("imports"); logging.basicConfig(level="INFO", stream=sys.stdout); '
        'clock.tell(logging.getLogger()); print(time.monotonic() - before)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=base_env(), cwd=ROOT
    )
    line, after = done.stdout.splitlines()
    whole = float(re.search(r'came (\S+) s after the process began: imports', line)[1])
    assert 0.5 < whole - float(after) < 10


def test_parts_that_come_in_pieces_are_one_in_order(monkeypatch, caplog):
    monkeypatch.setattr(start, '_age', lambda: 2.0)
    times = iter([10.0, 11.0, 11.5, 13.0])
    monkeypatch.setattr(start.time, 'monotonic', lambda: next(times))
    clock = StartClock()
    for part in ('imports', 'data', 'imports'):
        clock.passed(part)
    assert told(clock, caplog) == (
        'the first update came 5.00 s after the process began: imports 4.50, data 0.50'
    )


@pytest.mark.parametrize('text', ['', 'x (a) b', None])
def test_where_the_system_does_not_tell_it_begins_with_itself(monkeypatch, text):
    def read_text(path):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, 'read_text', read_text)
    assert start._age() == 0.0
