"""What dead processes leave goes, and nothing else: real files, and processes that are killed."""

import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from internvl_ds.checkpoint.tag import commit, discovery, owner
from internvl_ds.checkpoint.tag.manifest import Manifest
from internvl_ds.checkpoint.tag.owner import read_owner
from internvl_ds.checkpoint.tag.retention import KeepNewest
from internvl_ds.checkpoint.tag.sweep import sweep
from internvl_ds.checkpoint.tag.trash import MARK
from internvl_ds.files import write_text
from internvl_ds.tools.cli import main
from tests.harness.tags import SHARD, hidden, make_header, save_tag, stage_tag

_CALLS = ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.truncate')


def _in_child(action):
    """Runs it in a forked process; the exit status."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def _killed_at(call, action):
    """Runs it in a process that is killed at its n-th call to the file system; whether it was."""

    def run():
        count = 0

        def audited(event, args):
            nonlocal count
            if event in _CALLS:
                count += 1
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audited)
        action()
        os._exit(0)

    status = _in_child(run)
    assert status in (0, signal.SIGKILL)
    return status != 0


def _begin_and_die(output, tag='ckpt_epoch_0'):
    """The staging directory of a save whose process was killed."""

    def begin():
        stage_tag(output, tag)
        os.kill(os.getpid(), signal.SIGKILL)

    _in_child(begin)
    (staging,) = output.glob('.staging-*')
    return staging


def _move_to_another_host(output):
    """Has all records say that their process is another host's, which nothing here can see."""
    for path in [*output.glob('.lock-*'), *output.glob(f'.staging-*/{MARK}')]:
        owner = read_owner(path)
        path.write_text(owner._replace(host='elsewhere', machine='another').to_text())


def _age(seconds, *paths):
    for path in paths:
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_save_killed_at_any_call_leaves_a_whole_tag_and_is_cleared_up(tmp_path):
    """One that replaces a tag, names it in latest, and prunes another."""

    def save():
        staging, files = stage_tag(output, 'ckpt_epoch_1', 'new')
        manifest = Manifest(make_header('ckpt_epoch_1', 1, 3), files)
        commit.commit(staging, manifest, latest=True)
        commit.prune(output, [KeepNewest(1)])

    seen = set()
    for call in range(1, 500):
        output = tmp_path / str(call)
        save_tag(output, 0)
        save_tag(output, 1, content='old')
        killed = _killed_at(call, save)
        found = discovery.newest(output)
        assert found is not None
        seen |= {name.partition('-')[0] for name in hidden(output)}
        sweep(output)
        assert discovery.problem(output / 'ckpt_epoch_1') is None
        content = (output / 'ckpt_epoch_1' / SHARD).read_text()
        assert content == ('old' if killed else 'new') or killed
        assert (output / 'latest').read_text() == 'ckpt_epoch_1'
        left = hidden(output)
        assert all(name.startswith('.internvl_ds-') for name in left), (call, left)
        _age(7200, *(output / name for name in left))
        write_text(output / 'latest', 'ckpt_epoch_1')
        assert hidden(output) == []
        shutil.rmtree(output)
        if not killed:
            break
    assert not killed
    assert seen == {'.staging', '.lock', '.old', '.trash', '.internvl_ds'}


def test_what_a_user_made_stays_however_it_is_called(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tag = save_tag(tmp_path, 3)
    best = save_tag(tmp_path, 3, best='best')
    for name in ('X', 'X-00000000', 'X-0123456789abcdef', 'ckpt_epoch_3', 'ckpt_epoch_best'):
        for prefix in ('.trash-', '.old-', '.staging-', '.lock-'):
            (tmp_path / f'{prefix}{name}' / 'sub').mkdir(parents=True)
            (tmp_path / f'{prefix}{name}' / 'sub' / 'thesis.tex').write_text('years of work')
    shutil.copytree(best, tmp_path / '.old-ckpt_epoch_9', dirs_exist_ok=True)
    (tmp_path / '.trash-link-0123456789abcdef').symlink_to(tag)
    (tmp_path / '.lock-note').write_text('mine')
    every = sorted(tmp_path.rglob('*'))
    _age(10 * 86400, *every)
    for _ in range(2):
        assert sweep(tmp_path) == []
    save_tag(tmp_path, 3, best='best')
    assert [path for path in every if not path.exists()] == []
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said))  # once each
    assert f'{tmp_path}/.trash-X: not known to be of this version of internvl_ds' in str(said)


def test_what_a_user_named_like_a_tag_is_neither_pruned_nor_replaced(tmp_path):
    for name in ('ckpt_epoch_0', 'ckpt_epoch_0_step_7', 'ckpt_epoch_3'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'thesis.tex').write_text('years of work')
    (tmp_path / 'ckpt_epoch_4').write_text('notes')
    (tmp_path / 'ckpt_epoch_5').symlink_to('nowhere')
    (tmp_path / 'ckpt_epoch_6').mkdir()  # with nothing in it to lose
    for epoch in (1, 2, 6):
        save_tag(tmp_path, epoch)
    for epoch in (3, 4, 5):
        with pytest.raises(FileExistsError, match=f'is no tag.*ckpt_epoch_{epoch}'):
            commit.begin(tmp_path, f'ckpt_epoch_{epoch}')
    assert commit.prune(tmp_path, [KeepNewest(1)]) == ['ckpt_epoch_1', 'ckpt_epoch_2']
    assert main(['ckpt', 'prune', str(tmp_path), '--keep', '1', '--drop-later']) == 0
    assert len(list(tmp_path.glob('*/thesis.tex'))) == 3
    assert (tmp_path / 'ckpt_epoch_4').read_text() == 'notes'
    assert hidden(tmp_path) == []


def test_what_the_version_before_left_is_not_deleted(tmp_path):
    save_tag(tmp_path, 3, best='best', content='old').rename(tmp_path / 'kept')
    tag = save_tag(tmp_path, 4, best='best', content='new')
    aside = (tmp_path / 'kept').rename(tmp_path / '.old-ckpt_epoch_best')
    staging = tmp_path / '.staging-ckpt_epoch_5-00112233'
    staging.mkdir()
    (tmp_path / '.lock-ckpt_epoch_5-00112233').write_text('this-host')
    trash = tmp_path / '.trash-ckpt_epoch_1-00112233'
    trash.mkdir()
    _age(10 * 86400, staging, trash, aside)
    assert sweep(tmp_path) == []
    assert [path.exists() for path in (tag, aside, staging, trash)] == [True] * 4


def test_a_save_of_a_living_process_stays_though_its_lock_was_removed(tmp_path):
    staging, _ = stage_tag(tmp_path, 'ckpt_epoch_0')
    for lock in tmp_path.glob('.lock-*'):
        lock.unlink()
    _age(10 * 86400, staging.path, *staging.path.iterdir())
    assert sweep(tmp_path) == []
    commit.abandon(staging)


def test_a_save_of_a_dead_process_goes_though_its_lock_was_removed(tmp_path):
    staging = _begin_and_die(tmp_path)
    for lock in tmp_path.glob('.lock-*'):
        lock.unlink()
    assert sweep(tmp_path) == [staging.name]
    assert list(tmp_path.iterdir()) == []


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path):
    staging = _begin_and_die(tmp_path)
    (lock,) = tmp_path.glob('.lock-*')
    owner = read_owner(lock)._replace(pid=str(os.getpid()))  # started at another time
    (staging / MARK).write_text(owner.to_text())
    lock.unlink()
    assert sweep(tmp_path) == [staging.name]


def test_a_save_of_another_host_is_dead_after_so_long_without_a_write_anywhere_in_it(tmp_path):
    staging = _begin_and_die(tmp_path)
    _move_to_another_host(tmp_path)
    assert sweep(tmp_path) == []
    (staging / 'sub' / 'deep').mkdir(parents=True)
    (staging / 'sub' / 'deep' / 'shard').write_text('x')
    every = [*tmp_path.glob('.lock-*'), staging, *staging.rglob('*')]
    _age(25 * 3600, *every)
    (staging / 'sub' / 'deep' / 'shard').write_text('y')
    assert sweep(tmp_path) == []  # this file was written just now
    _age(25 * 3600, *every)
    assert sweep(tmp_path, age=26 * 3600) == []
    assert sweep(tmp_path) == [staging.name]
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_outlives_the_process_does_not_hold_its_save(tmp_path):
    """As workers of a data loader do that were forked while a save was under way."""
    ready, tell = os.pipe()

    def begin():
        stage_tag(tmp_path, 'ckpt_epoch_0')
        if not os.fork():
            os.write(tell, str(os.getpid()).encode())
            signal.pause()
        os.read(ready, 0)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    _in_child(begin)
    child = int(os.read(ready, 20))
    try:
        assert len(sweep(tmp_path)) == 1
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(ready)
        os.close(tell)


def test_what_is_removed_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tag = save_tag(tmp_path, 0)

    def discard_and_die():
        def audited(event, args):
            if event == 'os.remove' and Path(str(args[0])).name == SHARD:
                os.kill(os.getpid(), signal.SIGKILL)

        save_tag(tmp_path, 1)
        sys.addaudithook(audited)
        commit.prune(tmp_path, [KeepNewest(1)])

    _in_child(discard_and_die)
    (trash,) = tmp_path.glob('.trash-*')
    assert not tag.exists()
    sweep(tmp_path)
    assert not trash.exists()
    assert f'{trash}: the rest of a tag that was being removed; removed' in caplog.text


def test_retention_removes_a_link_to_a_tag_and_not_the_tag(tmp_path):
    elsewhere = save_tag(tmp_path / 'other', 0)
    save_tag(tmp_path / 'out', 1)
    (tmp_path / 'out' / 'ckpt_epoch_0').symlink_to(elsewhere)
    assert commit.prune(tmp_path / 'out', [KeepNewest(1)]) == ['ckpt_epoch_0']
    assert not (tmp_path / 'out' / 'ckpt_epoch_0').is_symlink()
    assert sorted(path.name for path in elsewhere.iterdir()) == ['manifest.json', SHARD]


@pytest.mark.parametrize('text', ['', '{', '[]', '"x"', '{"id": 1}', '[' * 3000, '\0' * 100])
def test_a_record_that_is_none_says_nothing(tmp_path, text):
    path = tmp_path / 'record'
    path.write_text(text)
    assert read_owner(path) is None
    (tmp_path / 'link').symlink_to('/dev/zero')
    os.mkfifo(tmp_path / 'pipe')
    assert read_owner(tmp_path / 'link') is read_owner(tmp_path / 'pipe') is None


def test_a_staging_directory_under_another_saves_id_is_left(tmp_path):
    """Somebody has copied or renamed it: what its mark says is of another."""
    _in_child(lambda: (stage_tag(tmp_path, 'ckpt_epoch_0'), os.kill(os.getpid(), signal.SIGKILL)))
    (staging,) = tmp_path.glob('.staging-*')
    staging.rename(tmp_path / f'.staging-ckpt_epoch_0-{"0" * 16}')
    assert sweep(tmp_path, age=0) == []
    assert (tmp_path / f'.staging-ckpt_epoch_0-{"0" * 16}' / SHARD).exists()


def test_a_lock_with_words_that_are_no_record_is_left(tmp_path):
    lock = tmp_path / f'.lock-ckpt_epoch_0-{"0" * 16}'
    lock.write_text('somebody else wrote this')
    assert sweep(tmp_path, age=0) == []
    assert lock.exists()
    lock.write_text('')  # killed before it wrote a word
    sweep(tmp_path, age=0)
    assert not lock.exists()


def test_a_held_lock_is_of_a_process_that_lives_wherever_it_is():
    elsewhere = owner.this_process()._replace(machine='another', host='another')
    for record in (elsewhere, None):
        assert owner.has_ended(record, False) is False
        assert owner.has_ended(record, None) is None
    assert owner.has_ended(elsewhere, True) is None  # its lock may not be seen from here


def test_a_process_that_has_ended_and_is_not_waited_for_has_no_start():
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert owner._started(child) == ''
    os.waitpid(child, 0)
    assert owner._started(child) is None
