"""Files are replaced whole."""

import logging
import os
import stat
import time

import pytest

from internvl_ds.files import for_show, open_own, replacing, write_text


def test_the_new_text_replaces_the_old_and_nothing_is_left_aside(tmp_path):
    path = tmp_path / 'latest'
    for text in ('ckpt_epoch_1', 'ä'):
        write_text(path, text)
        assert path.read_text(encoding='utf-8') == text
    assert os.listdir(tmp_path) == ['latest']


def test_a_reader_that_has_the_old_file_open_keeps_it(tmp_path):
    path = tmp_path / 'latest'
    write_text(path, 'old')
    with path.open() as reader:
        write_text(path, 'new and longer')
        assert reader.read() == 'old'


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / 'no' / 'latest', 'x')


def test_a_file_that_cannot_be_replaced_stays_and_nothing_is_left_aside(tmp_path):
    path = tmp_path / 'latest'
    path.mkdir()
    with pytest.raises(OSError, match='latest'):
        write_text(path, 'x')
    assert os.listdir(tmp_path) == ['latest']


def test_what_is_only_for_show_may_fail_and_says_so_once(tmp_path, caplog):
    logger = logging.getLogger('test')
    path = tmp_path / 'none' / 'x'
    for _ in range(2):
        with for_show(path, logger):
            path.write_text('x')
    with for_show(tmp_path / 'curves.png', logger):
        raise ValueError('an odd number')
    with for_show(tmp_path / 'y', logger):
        (tmp_path / 'y').write_text('y')
    assert (tmp_path / 'y').read_text() == 'y'
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(': ')[0] for line in said] == [str(path), str(tmp_path / 'curves.png')]
    assert 'cannot be written (FileNotFoundError: ' in said[0]
    assert 'cannot be written (ValueError: an odd number): the run goes on without it' in said[1]


def test_names_that_can_be_foreseen_lead_nowhere(tmp_path):
    """Whoever may write there puts links under the names that were written aside until now."""
    victim = tmp_path / 'victim'
    victim.write_text('precious')
    out = tmp_path / 'out'
    out.mkdir()
    for name in ('latest', '.latest.tmp', '.internvl_ds-.tmp'):
        (out / name).symlink_to(victim)
    write_text(out / 'latest', 'ckpt_epoch_1')
    assert victim.read_text() == 'precious'
    assert (out / 'latest').read_text() == 'ckpt_epoch_1'
    assert not (out / 'latest').is_symlink()


def test_what_is_written_aside_is_never_under_the_same_name(tmp_path):
    seen = set()
    for _ in range(20):
        with replacing(tmp_path / 'x') as file:
            file.write(b'x')
            seen |= {name for name in os.listdir(tmp_path) if name != 'x'}
    assert len(seen) == 20
    assert os.listdir(tmp_path) == ['x']


def test_the_mode_is_that_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / 'x', 'x')
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / 'x').stat().st_mode) == 0o640


def test_two_processes_may_write_one_file_at_once(tmp_path):
    """A thousand times each; until now one failed on the other's temporary name now and then."""
    path, child = tmp_path / 'latest', os.fork()
    text = 'parent' if child else 'child'
    failures, end = 0, time.monotonic() + 100
    for _ in range(1000):
        try:
            write_text(path, text * 100)
            failures += path.read_text() not in ('parent' * 100, 'child' * 100)
        except OSError:
            failures += 1
        if time.monotonic() > end:  # a slow disk
            break
    if not child:
        os._exit(min(failures, 1))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert failures == 0
    assert os.listdir(tmp_path) == ['latest']


def test_what_a_killed_process_left_aside_goes_once_it_is_old_and_nobody_writes_it(tmp_path):
    left = tmp_path / '.internvl_ds-0123456789abcdef.tmp'
    other = tmp_path / '.internvl_ds-mine.tmp'
    for path in (left, other):
        path.write_text('x')
    write_text(tmp_path / 'x', 'x')
    assert left.exists()
    for path in (left, other):
        os.utime(path, (time.time() - 7200,) * 2)
    with replacing(tmp_path / 'y') as file:
        (aside,) = (p for p in tmp_path.glob('.internvl_ds-*.tmp') if p not in (left, other))
        os.utime(aside, (time.time() - 7200,) * 2)
        write_text(tmp_path / 'x', 'x')  # of another thread, or process
        file.write(b'y')
    assert sorted(os.listdir(tmp_path)) == [other.name, 'x', 'y']


def test_an_error_names_the_file_and_not_what_was_written_aside(tmp_path):
    (tmp_path / 'x').mkdir()
    with pytest.raises(OSError, match=f"'{tmp_path}/x'$"):
        write_text(tmp_path / 'x', 'x')
    assert os.listdir(tmp_path) == ['x']


@pytest.mark.timeout(20)
@pytest.mark.parametrize('flags', [os.O_APPEND, os.O_TRUNC, os.O_RDWR])
def test_a_file_of_our_name_is_opened_as_a_file_only(tmp_path, flags):
    victim = tmp_path / 'victim'
    victim.write_text('precious')
    (tmp_path / 'link').symlink_to(victim)
    (tmp_path / 'dangling').symlink_to(tmp_path / 'nowhere')
    os.mkfifo(tmp_path / 'pipe')
    before = len(os.listdir('/proc/self/fd'))
    for name in ('link', 'dangling', 'pipe'):
        with pytest.raises(OSError, match=name):
            open_own(tmp_path / name, flags)
    assert len(os.listdir('/proc/self/fd')) == before
    assert victim.read_text() == 'precious'
    assert not (tmp_path / 'nowhere').exists()
    os.close(open_own(tmp_path / 'new', flags))
    assert (tmp_path / 'new').read_text() == ''


def test_an_error_names_the_file_and_not_what_is_written_aside(tmp_path):
    path = tmp_path / 'missing' / 'x'
    with pytest.raises(FileNotFoundError) as caught:
        write_text(path, 'x')
    assert caught.value.filename == str(path)
