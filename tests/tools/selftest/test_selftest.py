"""The self-test: all is ok where nothing is wrong, and each fault put in turns its row."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from internvl_ds.dist.network import free_port
from tests.harness.ranks import base_env, remove_shm_buffers, run_command, run_ranks
from tests.tools.selftest import faulting

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

MODULE = 'internvl_ds.tools.selftest'
MPIRUN = ['mpirun', '--allow-run-as-root', '--oversubscribe', '--bind-to', 'none']
MPI = pytest.mark.skipif(not shutil.which('mpirun'), reason='the mpi extra is not installed')


@pytest.mark.parametrize(
    ('ranks', 'quick', 'start'),
    [
        (1, True, ['internvl-ds', 'selftest']),
        (2, False, ['deepspeed', '--num_accelerators', '2', '--module', MODULE]),
        # Slow, and the same trials as on two ranks.
        pytest.param(
            4, True, [*MPIRUN, '-n', '4', 'internvl-ds', 'selftest'],
            marks=[MPI, pytest.mark.soak_only],
        ),
    ],
)  # fmt: skip
def test_nothing_is_wrong_here(tmp_path, ranks, quick, start):
    port, options = str(free_port()), ['--quick'] if quick else []
    if start[0] == 'deepspeed':
        start = [start[0], '--master_port', port, *start[1:]]
    command = [*start, '--json', '--output', str(tmp_path / 'out'), *options]
    try:
        job = run_command(command, 480, cwd=tmp_path)
        left = list(Path('/dev/shm').glob(f'*_{port}_*'))
    finally:
        remove_shm_buffers(port)
    assert left == []
    tree = json.loads(re.search(r'^\{$.*^\}$', job.output, re.M | re.S).group())
    verdicts = {row['name']: row['verdict'] for row in tree['rows']}
    assert tree['ranks'] == ranks
    assert len(verdicts) == (8 if quick else 13), job.output
    # Other tests beside this one may slow it down.
    timed = {name: verdicts.pop(name) for name in ('links', 'pace')}
    assert set(timed.values()) <= {'ok', 'slow', 'absent'}, job.output
    assert set(verdicts.values()) <= {'ok', 'absent'}, job.output
    assert job.returncode == int('slow' in timed.values())
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_ended_leaves_nothing_behind(tmp_path):
    command = ['internvl-ds', 'selftest', '--output', str(tmp_path / 'out')]
    with subprocess.Popen(command, env=base_env(), cwd=tmp_path, stderr=subprocess.DEVNULL) as job:
        while not list(tmp_path.glob('out/selftest-*')):
            assert job.poll() is None
            time.sleep(0.05)
        job.terminate()
        assert job.wait(60) == 143
    assert list(tmp_path.iterdir()) == []


SEEN = {
    'wrong norm': ('wrong', 'stage 1: the norm of update 0 off by 1.0e-03'),
    'skipped clip': ('wrong', 'stage 1: the norm of update 2'),
    'late average': ('wrong', 'stage 1: their average'),
    'lost group': ('wrong', 'stage 1: head.bias, norm.bias, norm.weight, stem.bias not trained'),
    'swapped shards': ('wrong', 'it cannot be loaded'),
    'stale latest': ('wrong', 'latest is ckpt_epoch_0'),
    'wrong device': ('wrong', 'on cpu'),
    'extra read': ('wrong', 'the host reads the device'),
    'slow link': ('slow', 'rank 0 to 1'),
    'error of a rank': ('wrong', 'rank 1: ValueError: of its own'),
    'absent rank': ('wrong', 'rank 0 waited 5 s and rank 1 on '),
}


def test_each_fault_turns_its_row(tmp_path):
    results = run_ranks(faulting.run_faults, 2, tmp_path, folder=str(tmp_path))
    for name, (verdict, text) in SEEN.items():
        got = results[0][name]
        assert (got[0], text in got[1]) == (verdict, True), (name, got)
    assert [result[2] for result in results[0].values()] == ['True'] * 10 + ['False']
