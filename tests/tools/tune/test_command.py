"""Launchers' words, completed; and the arguments of a trial."""

import re
import sys

import pytest

from internvl_ds.config.tree import default_config, merge_opts
from internvl_ds.errors import ConfigError
from internvl_ds.tools.tune.command import complete, opt_words, trial_words
from tests.harness.ranks import ROOT

SCRIPT = str(ROOT / 'launch' / 'train_deepspeed.sh')
MPI = str(ROOT / 'launch' / 'train_mpi.sh')
MODULE = ['-m', 'internvl_ds.train']


@pytest.fixture(autouse=True)
def programs(tmp_path, monkeypatch):
    """mpirun and srun need not be installed to have their words completed."""
    for name in ('mpirun', 'srun'):
        (tmp_path / name).write_text('#!/bin/sh\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin:{sys.prefix}/bin')


@pytest.mark.parametrize(
    ('words', 'expected', 'port'),
    [
        (
            ['deepspeed', '--num_gpus', '2'],
            ['deepspeed', '--master_port', '4242', '--num_gpus', '2', '--no_local_rank', '--module',
             'internvl_ds.train'],
            4242,
        ),
        (
            ['deepspeed', '--master_port=99', '--module', 'internvl_ds.train'],
            ['deepspeed', '--master_port=99', '--module', 'internvl_ds.train'],
            99,
        ),
        (
            ['deepspeed', '--hostfile', 'h', '--no_local_rank', '--module', 'internvl_ds.train'],
            ['deepspeed', '--hostfile', 'h', '--no_local_rank', '--module', 'internvl_ds.train'],
            None,
        ),
        (['torchrun', '--nproc-per-node', '2'],
         ['torchrun', '--nproc-per-node', '2', *MODULE], None),
        ([sys.executable], [sys.executable, *MODULE], None),
        (['mpirun', '-np', '2', 'python'], ['mpirun', '-np', '2', 'python', *MODULE], None),
        (['srun'], ['srun', sys.executable, *MODULE], None),
        (
            ['bash', '-c', 'ulimit -v 9; exec "$@"', 'x', 'python', *MODULE],
            ['bash', '-c', 'ulimit -v 9; exec "$@"', 'x', 'python', *MODULE],
            None,
        ),
        (['bash', SCRIPT, '-n', '2', '--'],
         ['bash', SCRIPT, '--port', '4242', '-n', '2', '--'], 4242),
        (['bash', SCRIPT, '-n', '2', '--port', '7', '--'],
         ['bash', SCRIPT, '-n', '2', '--port', '7', '--'], 7),
        (['bash', MPI, '-n', '2', '--'], ['bash', MPI, '-n', '2', '--'], None),
    ],
)  # fmt: skip
def test_words_are_completed_where_they_have_to_be(words, expected, port):
    assert complete(words, 4242) == (expected, port)


@pytest.mark.parametrize(
    ('words', 'text'),
    [
        ([], 'no launcher is given'),
        (['no-such-launcher'], 'no-such-launcher: there is no such program'),
        (['bash', 'other.sh'], "the launcher 'bash other.sh' does not start internvl_ds.train"),
        (['bash', '-c', 'true'], 'name it there, as in -- bash ... python -m internvl_ds.train'),
    ],
)
def test_words_that_start_something_else_are_refused(words, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        complete(words, 4242)


def test_a_trial_gets_the_users_settings_before_its_own(tmp_path):
    opts = {'DATA.BATCH_SIZE': 8, 'TRAIN.USE_CHECKPOINT': True}
    words = trial_words('c', tmp_path, 'd', ['DATA.BATCH_SIZE', '9'], opts)
    assert words[:4] == ['--cfg', 'c', '--output', f'{tmp_path}/out']
    assert words[4:8] == ['--deepspeed_config', f'{tmp_path}/ds_config.json', '--data-path', 'd']
    assert words[8:] == [
        '--opts', 'DATA.BATCH_SIZE', '9', 'DATA.BATCH_SIZE', '8', 'TRAIN.USE_CHECKPOINT', 'true',
    ]  # fmt: skip


def test_settings_survive_the_command_line():
    opts = {
        'MODEL.KWARGS': {'depth': 2, 'name': 'x'}, 'MODEL.PRETRAINED': '', 'BENCH.UPDATES': 7,
        'TRAIN.AUTO_RESUME': False, 'TRAIN.OPTIMIZER.BETAS': [0.9, 0.99], 'TRAIN.BASE_LR': 1e-5,
    }  # fmt: skip
    config = default_config()
    merge_opts(config, opt_words(opts))
    assert config.MODEL.KWARGS == {'depth': 2, 'name': 'x'}
    assert (config.MODEL.PRETRAINED, config.BENCH.UPDATES) == ('', 7)
    assert config.TRAIN.AUTO_RESUME is False
    assert list(config.TRAIN.OPTIMIZER.BETAS) == [0.9, 0.99]
    assert config.TRAIN.BASE_LR == 1e-5
