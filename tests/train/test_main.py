"""What the training program's process says when it ends. No ranks."""

import os
import runpy
import sys

import pytest

from internvl_ds.config.tree import default_config
from internvl_ds.dist import process_group, signals
from internvl_ds.errors import GradientOverflow, Preempted
from internvl_ds.train import loop


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Runs the program with a training that ends as a test says; gives its status and its word."""
    monkeypatch.setattr(process_group, 'init_distributed', lambda config, **flags: None)
    monkeypatch.setattr(process_group, 'shutdown', lambda: None)
    monkeypatch.setattr(signals, 'end_at_interrupt', lambda: None)
    monkeypatch.setenv('INTERNVL_DS_RESULT', str(tmp_path / 'result'))
    statuses = []
    monkeypatch.setattr(process_group, 'leave', statuses.append)

    def start(error, code):
        def run(config, ds_config, start):
            assert code == config.TRAIN.PREEMPT_EXIT_CODE
            if error is not None:
                raise error

        monkeypatch.setattr(loop, 'run', run)
        cfg = tmp_path / 'run.yaml'
        cfg.write_text(default_config().dump())
        opts = ['--opts', 'TRAIN.PREEMPT_EXIT_CODE', str(code), 'OUTPUT', str(tmp_path)]
        monkeypatch.setattr(sys, 'argv', ['train', '--cfg', str(cfg), *opts])
        runpy.run_module('internvl_ds.train', run_name='__main__')
        (status,) = statuses
        return status, (tmp_path / 'result').read_text()

    return start


@pytest.mark.parametrize('code', [0, 75])
def test_a_run_that_was_asked_to_stop_ends_with_the_status_of_its_configuration(program, code):
    assert program(Preempted(), code) == (code, f'preempted {code}\n')


def test_a_run_that_has_finished_ends_with_status_0(program):
    assert program(None, 75) == (0, 'finished\n')


def test_a_run_that_fails_says_neither(program):
    with pytest.raises(GradientOverflow):
        program(GradientOverflow('x', [], [], [], []), 75)
    assert not os.path.exists(os.environ['INTERNVL_DS_RESULT'])
