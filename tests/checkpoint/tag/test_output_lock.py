"""One job writes into an output directory, and always into the same one: real processes."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from internvl_ds.checkpoint.tag import output_lock
from internvl_ds.checkpoint.tag.output_lock import LOCK, enter_output, note_save
from internvl_ds.checkpoint.tag.owner import read_owner, this_process
from internvl_ds.config.tree import default_config
from internvl_ds.errors import CheckpointError
from tests.harness import beds
from tests.harness.tags import save_tag


def _config(**settings):
    config = default_config()
    config.CHECKPOINT.LOCK_WAIT = 0.0
    config.CHECKPOINT.update(settings)
    return config


def _enter(output, limit=30.0, **settings):
    enter_output(output, _config(**settings), limit)


@pytest.fixture(autouse=True)
def _no_lock_is_kept():
    yield
    output_lock._release_all()
    output_lock._outputs.clear()


@pytest.fixture
def job():
    """Starts a process that does something, and then waits; gives its number once it is done."""
    started = []

    def start(action):
        done, tell = os.pipe()
        child = os.fork()
        if not child:
            try:
                action()
                os.write(tell, b'x')
                signal.pause()
            finally:
                os._exit(1)
        started.append(child)
        os.close(tell)
        assert os.read(done, 1) == b'x'
        os.close(done)
        return child

    yield start
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def _kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _pretend_elsewhere(output):
    """Has the record say that its process is another host's."""
    path = output / LOCK
    path.write_text(read_owner(path)._replace(host='elsewhere', machine='another').to_text())


def _without_locks(monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(fcntl, 'flock', refuse)


def test_a_second_job_meets_an_error_that_says_who_is_there(tmp_path, job):
    child = job(lambda: _enter(tmp_path))
    since = read_owner(tmp_path / LOCK).since
    begun = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        _enter(tmp_path)
    assert time.monotonic() - begun < 3
    assert str(caught.value) == (
        f'{tmp_path}: another job writes there: process {child} on {socket.gethostname()}, since '
        f'{since}. Two jobs in one OUTPUT mix their tags: give each its own, or set '
        'CHECKPOINT.SHARED_OUTPUT True if that is meant'
    )
    _enter(tmp_path, SHARED_OUTPUT=True)
    assert read_owner(tmp_path / LOCK).pid == str(child)


def test_a_job_that_stands_still_holds_its_lock_and_a_dead_one_does_not(tmp_path, job):
    child = job(lambda: _enter(tmp_path))
    os.kill(child, signal.SIGSTOP)
    os.utime(tmp_path / LOCK, (0, 0))
    with pytest.raises(CheckpointError, match='another job writes there'):
        _enter(tmp_path, LOCK_AGE=0.1)
    _kill(child)
    begun = time.monotonic()
    _enter(tmp_path)
    assert time.monotonic() - begun < 3
    assert read_owner(tmp_path / LOCK).pid == str(os.getpid())


def test_a_job_waits_a_moment_for_one_that_is_ending(tmp_path, job):
    child = job(lambda: _enter(tmp_path))
    ends = os.fork()
    if not ends:
        time.sleep(1)
        os.kill(child, signal.SIGKILL)
        os._exit(0)
    _enter(tmp_path, LOCK_WAIT=30.0)
    os.waitpid(ends, 0)
    assert read_owner(tmp_path / LOCK).pid == str(os.getpid())


def test_a_child_that_outlives_its_job_does_not_hold_the_lock(tmp_path, job):
    ready, tell = os.pipe()

    def enter_and_fork():
        _enter(tmp_path)
        if not os.fork():
            os.write(tell, str(os.getpid()).encode())
            signal.pause()

    child = job(enter_and_fork)
    worker = int(os.read(ready, 20))
    try:
        with pytest.raises(CheckpointError, match=f'process {child} on'):
            _enter(tmp_path)
        _kill(child)
        _enter(tmp_path)
        os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(ready)
        os.close(tell)


def test_the_end_of_a_forked_child_leaves_the_lock_of_its_parent(tmp_path):
    _enter(tmp_path)
    child = os.fork()
    if not child:
        output_lock._release_all()  # as its exit functions do
        os._exit(0)
    os.waitpid(child, 0)
    assert read_owner(tmp_path / LOCK).pid == str(os.getpid())
    _enter(tmp_path)


def test_an_orderly_end_leaves_no_file_and_the_next_job_goes_on(tmp_path, job):
    def enter_and_leave():
        _enter(tmp_path)
        output_lock._release_all()

    job(enter_and_leave)
    assert os.listdir(tmp_path) == []
    _enter(tmp_path)
    output_lock._release_all()  # shutdown
    _enter(tmp_path)  # and another save all the same
    assert os.listdir(tmp_path) == [LOCK]


def test_one_of_many_that_come_at_once_has_the_lock(tmp_path):
    children, codes = [], []
    over, tell = os.pipe()
    for _ in range(8):
        child = os.fork()
        if not child:
            try:
                os.close(tell)
                _enter(tmp_path)
                os.read(over, 1)  # until the others have been refused
                os._exit(0)
            except CheckpointError:
                os._exit(3)
            finally:
                os._exit(1)
        children.append(child)
    os.close(over)
    end = time.monotonic() + 60
    while children:
        if tell >= 0 and (len(children) == 1 or time.monotonic() > end):
            os.close(tell)
            tell = -1
        for child in children.copy():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                codes.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.01)
    assert codes == [3] * 7 + [0]


def test_one_process_may_save_in_several_directories_and_twice_in_one(tmp_path):
    for name in ('a', 'b', 'a'):
        _enter(tmp_path / name)
        assert read_owner(tmp_path / name / LOCK).pid == str(os.getpid())


def test_a_directory_is_the_same_by_another_name_and_from_another_directory(tmp_path, monkeypatch):
    (tmp_path / 'link').symlink_to('out')
    monkeypatch.chdir(tmp_path)
    _enter(Path('out'), LOCK_AGE=0.3)
    monkeypatch.chdir('/')
    _enter(tmp_path / 'out')
    _enter(tmp_path / 'link')
    os.utime(tmp_path / 'out' / LOCK, (0, 0))
    time.sleep(0.2)
    assert (tmp_path / 'out' / LOCK).stat().st_mtime > 0  # a sign of life
    output_lock._release_all()
    assert list((tmp_path / 'out').iterdir()) == []


def test_a_lock_that_someone_removed_is_taken_again(tmp_path, job):
    _enter(tmp_path)
    (tmp_path / LOCK).unlink()
    _enter(tmp_path)

    def try_to_enter():
        with pytest.raises(CheckpointError, match='another job writes there'):
            _enter(tmp_path)

    job(try_to_enter)


def test_a_dead_job_of_another_host_holds_it_as_long_as_the_settings_say(tmp_path, job):
    child = job(lambda: _enter(tmp_path))
    _pretend_elsewhere(tmp_path)
    _kill(child)
    os.utime(tmp_path / LOCK)
    with pytest.raises(
        CheckpointError, match=r'elsewhere, .* silent for \d+ s and dead after .* 9'
    ):
        _enter(tmp_path, LOCK_AGE=90.0, limit=0.5)
    os.utime(tmp_path / LOCK)
    begun = time.monotonic()
    _enter(tmp_path, LOCK_AGE=2.0)
    assert 1 < time.monotonic() - begun < 10
    assert read_owner(tmp_path / LOCK).pid == str(os.getpid())


def test_a_living_job_of_another_host_holds_it(tmp_path, job):
    """It shows by its signs of life, where its lock cannot be seen from here."""

    def enter_unseen():
        _enter(tmp_path, LOCK_AGE=3.0)
        _pretend_elsewhere(tmp_path)
        (known,) = output_lock._outputs.values()
        known.owner = read_owner(tmp_path / LOCK)
        fcntl.flock(known.descriptor, fcntl.LOCK_UN)
        output_lock._beat(tmp_path / LOCK, known.owner, 0.5, known.ended)

    child = os.fork()
    if not child:
        enter_unseen()
    try:
        while not (there := read_owner(tmp_path / LOCK)) or there.host != 'elsewhere':
            time.sleep(0.05)
        begun = time.monotonic()
        with pytest.raises(CheckpointError, match='another job writes there: process .* elsewhere'):
            _enter(tmp_path, LOCK_AGE=20.0)
        assert time.monotonic() - begun < 10
    finally:
        _kill(child)


def test_where_there_are_no_file_locks_the_number_of_the_process_decides(
    tmp_path, job, monkeypatch
):
    _without_locks(monkeypatch)
    child = job(lambda: _enter(tmp_path, LOCK_AGE=6.0))
    with pytest.raises(CheckpointError, match=f'process {child} on'):
        _enter(tmp_path, LOCK_AGE=6.0)
    _kill(child)
    _enter(tmp_path, LOCK_AGE=6.0)
    assert read_owner(tmp_path / LOCK).pid == str(os.getpid())


def test_without_locks_the_last_of_two_that_write_at_once_has_it(tmp_path, monkeypatch):
    _without_locks(monkeypatch)
    other = this_process()._replace(host='elsewhere', machine='another')
    write_other = lambda seconds: (tmp_path / LOCK).write_text(other.to_text())  # noqa: E731
    monkeypatch.setattr(output_lock.time, 'sleep', write_other)
    with pytest.raises(CheckpointError, match='writes there: a process that just began'):
        _enter(tmp_path)
    assert read_owner(tmp_path / LOCK) == other


def test_nothing_is_left_of_a_longer_record(tmp_path):
    dead = this_process()._replace(pid='999999999', since='2024' * 50)
    (tmp_path / LOCK).write_text(dead.to_text())
    _enter(tmp_path)
    assert read_owner(tmp_path / LOCK).pid == str(os.getpid())


def test_what_the_disk_refuses_when_it_is_flushed_is_the_locks_error(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(OSError, match=f"Disk quota exceeded: '{tmp_path / LOCK}'"):
        _enter(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_lock_that_another_took_over_is_not_removed_at_the_end(tmp_path):
    _enter(tmp_path)
    other = this_process()._replace(host='elsewhere', machine='another')
    (tmp_path / LOCK).write_text(other.to_text())
    output_lock._release_all()
    assert read_owner(tmp_path / LOCK) == other


def test_a_job_that_slept_through_its_age_finds_that_another_took_over(tmp_path, job):
    _enter(tmp_path)
    (tmp_path / LOCK).unlink()  # as if its lock were not seen by the other host
    child = job(lambda: _enter(tmp_path))
    with pytest.raises(CheckpointError, match=f'process {child} on .* took over while'):
        _enter(tmp_path)


@pytest.mark.parametrize('shared', [False, True])
def test_a_directory_that_vanished_is_an_error_and_not_made_anew(tmp_path, shared):
    output = tmp_path / 'share' / 'out'
    _enter(output, SHARED_OUTPUT=shared)
    tag = save_tag(output, 0)
    note_save(output, tag.name, '')
    (tmp_path / 'share').rename(tmp_path / 'away')
    with pytest.raises(CheckpointError, match=f'{output}: this run writes there, and it is gone'):
        _enter(output, SHARED_OUTPUT=shared)
    assert not (tmp_path / 'share').exists()
    output.mkdir(parents=True)  # what lies below the mount point
    with pytest.raises(CheckpointError, match=f'{output}: is not the directory that this run has'):
        _enter(output, SHARED_OUTPUT=shared)
    assert os.listdir(output) == []


@pytest.mark.parametrize('shared', [False, True])
def test_a_share_that_is_mounted_again_is_the_same(tmp_path, shared):
    output = tmp_path / 'out'
    _enter(output, SHARED_OUTPUT=shared)
    shutil.copytree(output, tmp_path / 'copy')
    output.rename(tmp_path / 'away')
    (tmp_path / 'copy').rename(output)  # another inode and device are all that a mount changes
    if shared:
        output_lock._outputs[str(output)].saves['ckpt_epoch_0'] = ''
        save_tag(output, 0)
    _enter(output, SHARED_OUTPUT=shared)
    assert shared or read_owner(output / LOCK).pid == str(os.getpid())


def test_a_disk_without_room_for_the_lock_is_named_and_nothing_leaks(tmp_path):
    with beds.small_disk(tmp_path / 'disk', '64k') as output:
        with pytest.raises(OSError, match='No space left'):
            (output / 'filler').write_bytes(b'x' * (1 << 20))
        before = len(os.listdir('/proc/self/fd'))
        for _ in range(3):
            with pytest.raises(OSError, match=f"No space left on device: '{output / LOCK}'"):
                _enter(output)
        assert os.listdir(output) == ['filler']
        assert len(os.listdir('/proc/self/fd')) == before


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    victim = tmp_path / 'victim'
    victim.write_text('precious')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / LOCK).symlink_to(victim)
    with pytest.raises(OSError, match=LOCK):
        _enter(tmp_path / 'out')
    assert victim.read_text() == 'precious'
