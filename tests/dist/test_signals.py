"""What a process does with signals, also where its main thread cannot look at them."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.harness.ranks import ROOT, base_env


@pytest.fixture
def start():
    started = []

    def begin(what, **more):
        # From 3.12 on Python warns where a program with threads forks: this one means to.
        quiet = ['-W', 'ignore::DeprecationWarning']
        command = [sys.executable, *quiet, '-m', 'tests.dist.signalling', what]
        started.append(
            subprocess.Popen(
                command, env=base_env(), cwd=ROOT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more,
            )
        )  # fmt: skip
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def ends(process, seconds=10):
    """Its exit status and what it still printed."""
    return process.wait(seconds), process.stdout.read()


def test_ctrl_c_ends_a_program_that_is_in_c_code(start):
    program = start('in_c_code')
    program.stdout.readline()
    time.sleep(0.3)
    program.send_signal(signal.SIGINT)
    status, said = ends(program)
    assert status == 130
    assert said.endswith('ends the job at once: SIGINT\n')
    assert said.count('\n') == 1


@pytest.mark.parametrize('first', ['SIGTERM', 'SIGUSR1', 'SIGINT', 'SIGHUP'])
def test_the_first_signal_asks_and_sigint_after_it_ends_at_once(start, first):
    program = start('asked')
    child = int(program.stdout.readline())
    program.send_signal(getattr(signal, first))
    program.send_signal(signal.SIGINT)  # at the same time: a launcher that hands on what all got
    # Of two that are pending the kernel hands the lower number in first.
    assert program.stdout.readline().strip() in (first, 'SIGINT')
    time.sleep(1.2)
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)  # a launcher's, after the terminal's
    time.sleep(0.3)
    assert program.poll() is None
    # A child has its signals to itself.
    os.kill(child, signal.SIGTERM)
    program.send_signal(signal.SIGINT)
    status, said = ends(program)
    assert status == 130
    assert said.endswith('ends the job at once: a second signal\n')


def test_a_second_sigterm_ends_a_program_that_has_not_seen_the_first(start):
    """As one whose main thread waits for a GPU; see above for one that is at work."""
    program = start('stuck')
    program.stdout.readline()
    program.send_signal(signal.SIGTERM)
    time.sleep(1.3)  # too early: a launcher's, which forwards late
    program.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert program.poll() is None
    for _ in range(30):  # on a loaded machine its main thread may have moved until now
        program.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(1)
            break
    status, said = ends(program)
    assert status == 143
    assert 'rank 0 on ' in said
    assert said.endswith('a second SIGTERM; the main thread stands in C code\n')


def test_signals_to_a_forked_child_are_not_the_programs(start):
    program = start('asked')
    child = int(program.stdout.readline())
    os.kill(child, signal.SIGTERM)
    time.sleep(0.5)
    program.send_signal(signal.SIGUSR1)
    assert program.stdout.readline() == 'SIGUSR1\n'


def test_what_nohup_has_ignored_stays_ignored(start):
    ignore = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program = start('asked', restore_signals=False)
    finally:
        signal.signal(signal.SIGHUP, ignore)
    program.stdout.readline()
    program.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    program.send_signal(signal.SIGUSR1)
    assert program.stdout.readline() == 'SIGUSR1\n'


def test_whoever_had_the_signals_has_them_afterwards(start):
    assert ends(start('released')) == (0, 'True True -1\n')
