"""Starts under a real mpirun (Open MPI's, from PyPI), and under what only looks like one."""

import json
import shutil
import sys
import time

import pytest

from internvl_ds.dist.network import free_port
from tests.harness.ranks import run_command

MPIRUN = ['mpirun', '--allow-run-as-root', '--oversubscribe', '--bind-to', 'none']
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not shutil.which('mpirun'), reason='the mpi extra is not installed'),
]


def launch(ranks, what, folder, timeout=120, **env):
    command = [*MPIRUN, '-np', str(ranks), sys.executable, '-m', 'tests.dist.launched', what]
    return run_command([*command, str(folder)], timeout, env=env)


def test_four_ranks_and_a_given_port(tmp_path):
    port = str(free_port())
    job = launch(4, 'train', tmp_path, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    assert job.returncode == 0, job.output
    reports = [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(4)]
    assert {report['MASTER_PORT'] for report in reports} == {port}
    assert [report['LOCAL_RANK'] for report in reports] == ['0', '1', '2', '3']
    assert {report['size'] for report in reports} == {4}


def test_an_exception_on_one_rank_ends_the_job(tmp_path):
    start = time.monotonic()
    job = launch(2, 'fail', tmp_path)
    assert job.returncode not in (0, None)
    assert 'ValueError: a bad batch' in job.output
    assert 'rank 1 on ' in job.output
    assert 'ends the job: ValueError: a bad batch' in job.output
    assert time.monotonic() - start < 90  # rank 0 would have slept for 120 s


@pytest.mark.first
def test_a_library_of_another_mpi_is_refused(tmp_path):
    # What MPICH's mpiexec.hydra sets, and Open MPI's library: each process is a world of its own.
    job = run_command(
        [sys.executable, '-m', 'tests.dist.launched', 'train', str(tmp_path)],
        60,
        env={'PMI_RANK': '1', 'PMI_SIZE': '2'},
    )
    assert job.returncode != 0
    assert 'started 2 ranks, but the MPI library that mpi4py found (Open MPI' in job.output
    assert 'sees 1: it is of another MPI' in job.output


def test_a_rank_0_that_is_not_there_is_named(tmp_path):
    port = str(free_port())
    job = run_command(
        [
            sys.executable, '-c',
            'from internvl_ds.dist.process_group import init_distributed\n'
            'from internvl_ds.config.tree import default_config\n'
            'config = default_config()\n'
            'config.COMM.INIT_TIMEOUT = 4\n'
            'init_distributed(config)\n',
        ],
        60,
        env={
            'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '1',
            'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port,
        },
    )  # fmt: skip
    assert job.returncode != 0
    assert 'RankError: rank 1 of 2 on ' in job.output
    assert f'could not join the others at 127.0.0.1:{port} within 4 s' in job.output
