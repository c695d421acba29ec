"""Saves that fail: the same error on all ranks, nothing lost, and training goes on."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from internvl_ds.checkpoint.tag.discovery import newest, problem
from internvl_ds.checkpoint.tag.output_lock import _release_all, enter_output
from internvl_ds.checkpoint.tag.verify import damage_of_tag
from internvl_ds.config.tree import default_config
from tests.checkpoint import failing
from tests.checkpoint.failing import start_program
from tests.dist import waiting
from tests.harness import beds
from tests.harness.counts import SOAK
from tests.harness.ranks import run_ranks

# All three are ended by the same exit function.
SOAK_ONLY = pytest.mark.soak_only
WAYS = [
    'shuts down', pytest.param('just ends', marks=SOAK_ONLY),
    pytest.param('leaves the group', marks=SOAK_ONLY),
]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 2 MiB of its own."""
    with beds.small_disk(tmp_path / 'disk', '2m') as path:
        yield path


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize(('stage', 'in_background'), [(1, False), (3, False), (3, True)])
def test_a_disk_too_small_for_the_second_save(tmp_path, small_disk, stage, in_background):
    results = run_ranks(
        failing.full_disk, 2, tmp_path,
        stage=stage, root=small_disk, in_background=in_background,
    )  # fmt: skip
    for result in results:
        refused, full = result['refused'], result['full']
        assert refused == results[0]['refused']
        assert refused.startswith(f'CheckpointError: {small_disk}/ckpt_epoch_1: needs ')
        assert 'are free: nothing was written' in refused
        assert full == results[0]['full']
        assert full.startswith(f'CheckpointError: {small_disk}/ckpt_epoch_1: ')
        assert 'No space left on device' in full
        assert 'rank ' in full
        for left in (result['left refused'], result['left_full']):
            assert [n for n in left if not n.startswith('zero_to')] == [
                'ckpt_epoch_0',
                'filler',
                'latest',
            ]
        assert result['latest'] == 'ckpt_epoch_0'
        assert {'ckpt_epoch_0', 'ckpt_epoch_2', 'latest'} <= set(result['left'])
        assert result['first tag intact']


@pytest.mark.ranks
def test_a_read_only_output(tmp_path, small_disk):
    for result in run_ranks(failing.read_only, 2, tmp_path, root=small_disk):
        assert result['error'].startswith(f'CheckpointError: {small_disk}/ckpt_epoch_1: ')
        assert 'Read-only file system' in result['error']
        assert 'ckpt_epoch_0' in result['left']
        assert 'ckpt_epoch_1' in result['after']


@pytest.mark.ranks
@pytest.mark.parametrize('stage', [1, 3])
@pytest.mark.parametrize('in_background', [False, True])
def test_a_rank_that_cannot_write_all_of_its_shard(tmp_path, stage, in_background):
    results = run_ranks(
        failing.one_rank_is_limited, 2, tmp_path,
        stage=stage, root=tmp_path / 'out', in_background=in_background,
    )  # fmt: skip
    for result in results:
        # In the background a failure is told by the next call; that call's own save is not made.
        error = result['next' if in_background else 'own']
        assert error == results[0]['next' if in_background else 'own']
        assert error.startswith(f'CheckpointError: {tmp_path}/out/ckpt_epoch_1: not saved')
        assert 'rank 1: ' in error
        assert 'File too large after 4096 bytes' in error
        assert '_states.pt' in error
        assert 'the file needs' in error
        if in_background:
            assert result['own'] == result['background'] == 'no error'
        tags = [n for n in result['left'] if not n.startswith('zero_to')]
        assert tags == ['ckpt_epoch_0', 'latest']
        assert result['latest'] == 'ckpt_epoch_3'
        assert not [name for name in result['after'] if name.startswith('.')]


@pytest.mark.ranks
def test_a_save_in_the_background_goes_where_it_began_to(tmp_path):
    found = run_ranks(failing.changes_its_directory, 2, tmp_path, root=tmp_path)
    assert found == ['out/ckpt_epoch_0'] * 2
    assert problem(tmp_path / 'out' / 'ckpt_epoch_0') is None


@pytest.mark.ranks
def test_an_output_that_another_job_holds_or_that_vanished_is_an_error_on_all_ranks(tmp_path):
    cfg = tmp_path / 'job.yaml'
    cfg.write_text('MODEL: {TYPE: timm}\n')
    taken = tmp_path / 'job'
    enter_output(taken, default_config(), 30.0)
    try:
        results = run_ranks(failing.locked_and_vanished, 2, tmp_path, root=tmp_path, cfg=cfg)
    finally:
        _release_all()
    for result in results:
        said = f'CheckpointError: {taken}: another job writes there: process {os.getpid()} on '
        assert result['program'].startswith(said)
        assert result['script'].startswith(said)
        assert 'CHECKPOINT.SHARED_OUTPUT' in result['script']
        assert result['left'] == []  # no tag, no log, nothing made before it was known
        assert {'ckpt_epoch_0', 'latest'} <= set(result['shared'])
        gone = f'CheckpointError: {tmp_path}/share/out: this run writes there, and it is gone'
        assert result['vanished'].startswith(gone)
        assert not result['made anew']
        assert {'ckpt_epoch_1', 'latest'} <= set(result['after'])


@pytest.mark.ranks
def test_where_latest_cannot_be_written_the_tag_is_not_published(tmp_path):
    root = tmp_path / 'out'
    for result in run_ranks(failing.latest_in_the_way, 2, tmp_path, root=root):
        said = f'CheckpointError: {root}/ckpt_epoch_1: not saved, and the earlier checkpoints stay'
        assert result['error'].startswith(said)
        assert f"{root}/latest'" in result['error']
        assert 'ckpt_epoch_1' not in result['left']
        assert result['found'] == f'{root}/ckpt_epoch_0'
        assert {'ckpt_epoch_0', 'ckpt_epoch_1', 'latest'} <= set(result['after'])


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.soak
def test_a_disk_may_be_slower_than_a_collective(tmp_path):
    stages = [0, 1, 2, 3] if SOAK else [1, 3]  # DeepSpeed saves and loads 0 as 1, and 2 too
    for result in run_ranks(waiting.slow_disk, 2, tmp_path, root=tmp_path / 'out', stages=stages):
        assert result.pop('pretrained') == 'no error'
        assert list(map(int, result)) == stages
        for stage, got in result.items():
            errors = {name: text for name, text in got.items() if 'load' in name or name == 'save'}
            assert set(errors.values()) == {'no error'}, (stage, errors)
            assert got['steps'] == 1
            assert got['held'] < 20_000, (stage, got['held'])  # what is to be written is no copy


def _end(processes, timeout):
    deadline = time.monotonic() + timeout
    try:
        return [p.wait(max(0.1, deadline - time.monotonic())) for p in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _logs(root):
    return [Path(f'{root}.log_{r}').read_text() for r in range(2)]


@pytest.mark.ranks
@pytest.mark.parametrize('how', WAYS)
def test_the_end_of_a_program_waits_for_a_background_save(tmp_path, how):
    root = tmp_path / 'out'
    codes = _end(start_program(root, how), 120)
    assert codes == [0, 0], _logs(root)
    assert newest(root) == (root / 'ckpt_epoch_1', None)
    assert damage_of_tag(root / 'ckpt_epoch_1') == []


@pytest.mark.ranks
def test_a_background_save_that_fails_at_the_end_makes_the_exit_status_non_zero(tmp_path):
    root = tmp_path / 'out'
    codes = _end(start_program(root, 'fails'), 120)
    assert codes == [1, 1], _logs(root)
    for log in _logs(root):
        assert 'ckpt_epoch_1: not saved' in log
        assert 'rank 1: ' in log
    assert newest(root) == (root / 'ckpt_epoch_0', None)


@pytest.mark.ranks
@pytest.mark.parametrize('how', ['terminated', 'handles SIGTERM'])
def test_sigterm_finishes_or_discards_a_background_save(tmp_path, how):
    root = tmp_path / 'out'
    processes = start_program(root, how)
    deadline = time.monotonic() + 120
    while not all((root / f'ready_{r}').exists() for r in range(2)):
        assert time.monotonic() < deadline, _logs(root)
        assert not any(p.poll() for p in processes), _logs(root)
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    codes = _end(processes, 60)
    whole = root / ('ckpt_epoch_0' if how == 'terminated' else 'ckpt_epoch_1')
    assert codes == ([-signal.SIGTERM] * 2 if how == 'terminated' else [0, 0]), _logs(root)
    assert newest(root) == (whole, None)
    assert damage_of_tag(whole) == []
