"""train_slurm.sbatch on a real Slurm of one host: it trains, is stopped, and is queued again."""

import json
import re

import pytest

from internvl_ds.checkpoint.tag.discovery import read_header
from tests.harness import slurm
from tests.harness.ranks import ROOT, run_command, wait_for_words
from tests.harness.training import small_config, write_folder

SCRIPT = str(ROOT / 'launch' / 'train_slurm.sbatch')


def test_help_leaves_sbatchs_lines_out():
    job = run_command(['bash', SCRIPT, '--help'], 20)
    assert job.returncode == 0
    assert job.output.startswith('Trains in a Slurm job')
    assert '#' not in job.output
    assert 'SBATCH' not in job.output


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(f'cannot start Slurm: {reason}')
    with slurm.Slurm(tmp_path_factory.mktemp('cluster')) as made:
        yield made


class Submitted:
    """A job of two ranks, and its log."""

    def __init__(self, cluster, folder, epochs):
        data = write_folder(folder / 'images', classes=3, train=12, val=6)
        cfg = folder / 'small.yaml'
        cfg.write_text(small_config(data, TRAIN__WARMUP_EPOCHS=0, DATA__BATCH_SIZE=2).dump())
        self.cluster, self.output, self.log = cluster, folder / 'small', folder / 'log'
        self.number = cluster.call(
            'sbatch', '--parsable', '--nodes=1', '--ntasks-per-node=2', '--gpus-per-node=0',
            '--time=30', '--signal=B:USR1@60', f'--output={self.log}', SCRIPT, '--',
            '--cfg', str(cfg), '--output', str(folder), '--opts', 'TRAIN.EPOCHS', str(epochs),
            cwd=ROOT, INTERNVL_DS_RESULT=str(folder / 'result'),
        )  # fmt: skip

    def text(self):
        return self.log.read_text() if self.log.exists() else ''

    def wait_for(self, words, seconds=120):
        assert wait_for_words(words, self.log, seconds), self.text()[-3000:]

    def wait_until(self, *states, seconds=120):
        return self.cluster.wait_for(self.number, set(states), seconds)

    def saved(self):
        tag = (self.output / 'latest').read_text()
        return tag, read_header(self.output / tag)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_job_near_its_time_limit_is_queued_again_and_goes_on(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, epochs=400)
    job.wait_for('epoch 1:')
    # What --signal=B:USR1@60 has Slurm do 60 s before the limit.
    cluster.call('scancel', '--batch', '--signal=USR1', job.number)
    job.wait_for('saved and stopped, as asked')
    tag, saved = job.saved()
    assert '_step_' in tag
    job.wait_for(f'resuming from {job.output / tag}')
    assert job.wait_until('RUNNING', 'COMPLETING', 'COMPLETED')['Restarts'] == '1'
    job.wait_for(f'epoch {saved.epoch} goes on after micro-batch {saved.step} of 3')
    assert 'started by Slurm: 2 ranks, rank 0 at localhost:' in job.text()
    # And once more, this time for good: a signal to the ranks.
    job.wait_for(f'epoch {saved.epoch + 2}:')
    cluster.call('scancel', '--signal=TERM', job.number)
    done = job.wait_until('COMPLETED', 'FAILED', 'CANCELLED')
    assert (done['JobState'], done['ExitCode'], done['Restarts']) == ('COMPLETED', '0:0', '1')
    assert job.saved()[1].sequence > saved.sequence
    lines = (job.output / 'metrics.jsonl').read_text().splitlines()
    epochs = [json.loads(line)['epoch'] for line in lines]
    assert epochs == list(range(len(epochs)))


@pytest.mark.ranks
@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_queued_again(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, epochs=10000)
    job.wait_for('epoch 1:')
    cluster.call('scancel', job.number)
    assert job.wait_until('CANCELLED', seconds=60)['Restarts'] == '0'
    job.wait_for('saved and stopped, as asked', 40)
    assert '_step_' in job.saved()[0]


@pytest.mark.ranks
@pytest.mark.slow
def test_a_job_whose_rank_dies_fails(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, epochs=10000)
    job.wait_for('epoch 1:')
    pids = cluster.call('scontrol', 'listpids', job.number).splitlines()[1:]
    ranks = [line.split() for line in pids if re.search(r'\s1$|\s1\s', line)]
    cluster.call('kill', '-9', ranks[-1][0])
    done = job.wait_until('FAILED', 'COMPLETED', seconds=60)
    assert done['JobState'] == 'FAILED'
    assert 'task 1: Killed' in job.text()
