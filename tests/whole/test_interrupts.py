"""Ctrl-C and a closed terminal: all ranks save and stop, under every launcher and alone."""

import re
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from internvl_ds.dist.network import free_port
from tests.harness import mpich
from tests.harness.counts import SOAK
from tests.harness.interrupts import STOPPED, Interrupted
from tests.harness.ranks import wait_for_words
from tests.harness.starts import start_command

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(600)]

ALONE = [sys.executable, '-m', 'internvl_ds.train']
DEEPSPEED = ['deepspeed', '--num_gpus', '2', '--no_local_rank', '--master_port']


def once(folder, launcher):
    """Ctrl-C once: `deepspeed` and torchrun as they are, the others by their scripts."""
    port, env = str(free_port()), {}
    command = start_command(launcher.removesuffix(' itself'), 2, port)
    if launcher == 'deepspeed itself':
        command = [*DEEPSPEED, port, '--module', 'internvl_ds.train']
    if launcher == 'MPICH':
        env = mpich.make_environment(folder)
    job = Interrupted(folder, command, port, **env)
    job.wait_until_it_trains()
    job.press_ctrl_c()
    return job.end()


def on_a_terminal(folder):
    job = Interrupted(folder, ALONE, terminal=True, opts=('CHECKPOINT.ASYNC', 'True'))
    job.wait_until_it_trains()
    job.press_ctrl_c()
    return job.end()


def closed_terminal(folder):
    job = Interrupted(folder, ALONE, terminal=True)
    job.wait_until_it_trains()
    job.close_terminal()
    return job.end()


def twice(folder):
    """No boundary comes any more after the first."""
    job = Interrupted(folder, ALONE)
    job.wait_until_it_trains()
    job.hang()
    job.press_ctrl_c()
    time.sleep(1.5)
    assert job.process.poll() is None
    job.press_ctrl_c()
    return job.end()


def twice_under_a_script(folder):
    port = str(free_port())
    job = Interrupted(folder, start_command('deepspeed', 2, port), port)
    job.wait_until_it_trains()
    job.hang(ranks=2)
    job.press_ctrl_c()
    assert wait_for_words('a second signal ends it', job.log, 20)
    job.press_ctrl_c()
    return job.end()


def before_training(folder, launcher, seconds):
    """Ctrl-C while the ranks import their libraries, or wait for each other."""
    port = str(free_port())
    command = ALONE if launcher == 'alone' else start_command(launcher, 2, port)
    job = Interrupted(folder, command, port)
    time.sleep(seconds)
    job.press_ctrl_c()
    return job.end()


def waiting_for_a_rank(folder):
    """Ctrl-C in one of two ranks, of which the other never comes: its main thread is in C code."""
    port = str(free_port())
    env = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1'}
    job = Interrupted(folder, ALONE, port, MASTER_PORT=port, **env)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(('127.0.0.1', int(port))) == 0:
                break
        time.sleep(0.2)
    time.sleep(1)
    job.press_ctrl_c()
    return job.end()


# Those whose scripts and launchers have signals of their own to hand on; the others with --soak.
ONCE = ['deepspeed', 'Open MPI', *(['deepspeed itself', 'torchrun', 'MPICH'] if SOAK else [])]


@pytest.fixture(scope='module')
def ends(tmp_path_factory):
    """All jobs, three at a time."""
    jobs = {name: (once, name) for name in ONCE}
    if not shutil.which('mpirun'):
        del jobs['Open MPI']
    jobs.update({f.__name__: (f,) for f in (on_a_terminal, closed_terminal, twice)})
    jobs.update({f.__name__: (f,) for f in (twice_under_a_script, waiting_for_a_rank)})
    jobs['imports'] = before_training, 'alone', 2.0
    jobs['imports under a script'] = before_training, 'deepspeed', 6.0
    with ThreadPoolExecutor(3) as pool:
        futures = {
            name: pool.submit(function, tmp_path_factory.mktemp('job'), *more)
            for name, (function, *more) in jobs.items()
        }
        return {name: future.result() for name, future in futures.items()}


def check_saved(end):
    assert '_step_' in end.latest, end
    assert end.left == []
    assert end.logged.endswith(' saved !!!\n')
    assert 'save and stop at the next boundary: rank' in end.logged
    # deepspeed and torchrun print a traceback of their own, and no rank does.
    assert not re.search(r'File ".*/internvl_ds/', end.output), end.output


# What the launchers themselves make of it.
STATUS = {'torchrun': 1, 'deepspeed itself': -signal.SIGINT}


@pytest.mark.parametrize('launcher', ONCE)
def test_all_ranks_save_and_stop_under(ends, launcher):
    if launcher not in ends:
        pytest.skip('the mpi extra is not installed')
    end = ends[launcher]
    check_saved(end)
    assert end.status == STATUS.get(launcher, STOPPED), end
    if launcher in ('deepspeed', 'Open MPI', 'MPICH'):
        assert 'Traceback' not in end.output, end.output


def test_a_program_alone_saves_and_stops(ends):
    end = ends['on_a_terminal']
    check_saved(end)
    assert end.status == STOPPED
    assert 'Traceback' not in end.output
    assert '(SIGINT)' in end.output


def test_a_terminal_that_is_closed_is_one_that_asks_to_stop(ends):
    end = ends['closed_terminal']
    check_saved(end)
    assert end.status == STOPPED
    assert '(SIGHUP)' in end.logged


def test_a_second_one_ends_it_at_once(ends):
    end = ends['twice']
    assert end.status == 130
    assert end.seconds < 5
    assert end.left == []
    assert '_step_' not in end.latest
    assert 'Traceback' not in end.output
    assert end.output.splitlines()[-1].endswith('ends the job at once: a second signal')


def test_a_second_one_to_a_script_ends_it_at_once(ends):
    end = ends['twice_under_a_script']
    assert end.status == 130
    assert end.seconds < 20
    assert end.left == []
    assert 'Traceback' not in end.output


@pytest.mark.parametrize('job', ['imports', 'imports under a script', 'waiting_for_a_rank'])
def test_before_training_it_ends_at_once_in_one_line(ends, job):
    end = ends[job]
    assert end.status == 130
    assert end.seconds < 20
    assert end.left == []
    assert 'Traceback' not in end.output, end.output
    told = [line for line in end.output.splitlines() if 'at once' in line]
    assert len(told) == 1, end.output
    assert told[0] == end.output.splitlines()[-1] or 'under a script' in job
