"""Stage, commit, latest, prune, sweep: real files and processes, no ranks."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_ds.checkpoint.tag import commit, discovery
from internvl_ds.checkpoint.tag.manifest import FileEntry, Manifest
from internvl_ds.checkpoint.tag.retention import KeepBest, KeepLater, KeepNewest
from internvl_ds.checkpoint.tag.trash import MARK
from internvl_ds.errors import CheckpointError
from tests.harness import beds
from tests.harness.ranks import ROOT, base_env
from tests.harness.tags import SHARD, hidden, make_header, save_tag, stage_tag


def _commit(staging, files, sequence=1):
    return commit.commit(staging, Manifest(make_header(staging.tag, 0, sequence), files))


@pytest.fixture
def other_process():
    """Starts a process that begins a save and keeps it open; gives it and the staging path."""
    code = """
import sys
from pathlib import Path
from internvl_ds.checkpoint.tag import commit
staging = commit.begin(Path(sys.argv[1]), sys.argv[2])
(staging.path / 'half').write_text('half')
print(staging.path, flush=True)
sys.stdin.read()
"""
    started = []

    def start(output, tag='ckpt_epoch_0'):
        process = subprocess.Popen(
            [sys.executable, '-c', code, str(output), tag],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=base_env(), cwd=ROOT,
        )  # fmt: skip
        started.append(process)
        line = process.stdout.readline().strip()
        assert line, 'it died'  # an empty path would be the directory that the tests run in
        return process, Path(line)

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def full_disk(tmp_path):
    """A tmpfs with not a byte left."""
    with beds.small_disk(tmp_path / 'disk', '64k') as path:
        with pytest.raises(OSError, match='No space left'):
            (path / 'filler').write_bytes(b'x' * (1 << 20))
        yield path


def _kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_save_is_a_tag_and_leaves_nothing_else(tmp_path):
    tag = save_tag(tmp_path, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt_epoch_0', 'latest']
    assert sorted(p.name for p in tag.iterdir()) == ['manifest.json', SHARD]
    assert discovery.newest(tmp_path) == (tag, None)


def test_the_output_directory_is_made(tmp_path):
    tag = save_tag(tmp_path / 'a' / 'b', 0)
    assert discovery.newest(tmp_path / 'a' / 'b') == (tag, None)


def test_a_save_that_cannot_begin_leaves_nothing(tmp_path):
    tag = 'ckpt_epoch_' + 'x' * 229  # a lock of that name can be made, a staging directory not
    with pytest.raises(OSError, match='File name too long'):
        commit.begin(tmp_path, tag)
    assert list(tmp_path.iterdir()) == []


def test_a_save_under_way_is_never_read(tmp_path):
    staging, _ = stage_tag(tmp_path, 'ckpt_epoch_0')
    assert discovery.newest(tmp_path) is None
    assert discovery.tags(tmp_path) == []
    commit.abandon(staging)


def test_an_abandoned_save_leaves_nothing(tmp_path):
    staging, _ = stage_tag(tmp_path, 'ckpt_epoch_0')
    commit.abandon(staging)
    commit.abandon(staging)
    assert list(tmp_path.iterdir()) == []


def test_an_abandoned_save_leaves_what_was_there(tmp_path):
    tag = save_tag(tmp_path, 3, best='best', content='old')
    staging, _ = stage_tag(tmp_path, 'ckpt_epoch_best', 'new')
    commit.abandon(staging)
    assert (tag / SHARD).read_text() == 'old'
    assert list(tmp_path.iterdir()) == [tag]


def test_overwriting_a_tag_keeps_nothing_of_the_old_one(tmp_path):
    old = save_tag(tmp_path, 3, best='best', content='old')
    (old / 'more').write_text('x')
    tag = save_tag(tmp_path, 5, best='best', content='new')
    assert tag == old
    assert (tag / SHARD).read_text() == 'new'
    assert discovery.read_manifest(tag).header.epoch == 5
    assert sorted(p.name for p in tag.iterdir()) == ['manifest.json', SHARD]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt_epoch_best']


def test_a_commit_that_fails_leaves_the_old_tag(tmp_path):
    tag = save_tag(tmp_path, 0, content='old')
    staging, files = stage_tag(tmp_path, tag.name, 'new')
    shutil.rmtree(staging.path)  # by someone
    with pytest.raises(FileNotFoundError):
        _commit(staging, files)
    commit.abandon(staging)
    assert (tag / SHARD).read_text() == 'old'
    assert discovery.newest(tmp_path) == (tag, None)
    assert hidden(tmp_path) == []


def test_two_saves_of_one_tag_at_once_do_not_meet(tmp_path):
    first, files = stage_tag(tmp_path, 'ckpt_epoch_best', 'first')
    second, more = stage_tag(tmp_path, 'ckpt_epoch_best', 'second')
    assert first.path != second.path
    assert commit.sweep(tmp_path) == []
    tag = _commit(second, more, 1)
    assert (tag / SHARD).read_text() == 'second'
    assert _commit(first, files, 2) == tag
    assert (tag / SHARD).read_text() == 'first'
    assert list(tmp_path.iterdir()) == [tag]


def test_one_save_may_be_abandoned_while_another_of_the_tag_goes_on(tmp_path):
    first, _ = stage_tag(tmp_path, 'ckpt_epoch_best', 'first')
    second, files = stage_tag(tmp_path, 'ckpt_epoch_best', 'second')
    commit.abandon(first)
    assert (_commit(second, files) / SHARD).read_text() == 'second'
    assert hidden(tmp_path) == []


def test_a_save_of_a_living_process_is_not_swept(tmp_path, other_process, caplog):
    process, staging = other_process(tmp_path)
    for path in (staging / 'half', staging):
        os.utime(path, (0, 0))  # however long ago it wrote
    assert commit.sweep(tmp_path) == []
    own = commit.begin(tmp_path, 'ckpt_epoch_0')
    assert (staging / 'half').exists()
    assert own.path != staging
    assert process.poll() is None
    assert caplog.text == ''
    commit.abandon(own)


def test_a_save_of_a_killed_process_is_swept_with_a_warning(tmp_path, other_process, caplog):
    process, staging = other_process(tmp_path)
    _kill(process)
    assert commit.sweep(tmp_path) == [staging.name]
    assert f'{staging}: left by a save that died; removed' in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_next_save_sweeps_away_only_what_dead_ones_left(tmp_path, other_process):
    dead, left = other_process(tmp_path)
    _, living = other_process(tmp_path)
    _kill(dead)
    tag = save_tag(tmp_path, 0)
    assert not left.exists()
    assert (living / 'half').exists()
    assert discovery.newest(tmp_path) == (tag, None)
    assert len(hidden(tmp_path)) == 2  # the living save and its lock


def test_the_lock_of_a_save_that_died_before_it_wrote_is_swept(tmp_path, other_process):
    process, staging = other_process(tmp_path)
    _kill(process)
    shutil.rmtree(staging)
    assert commit.sweep(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_died_before_its_mark_is_known_by_its_lock(tmp_path, other_process):
    process, staging = other_process(tmp_path)
    _kill(process)
    (staging / MARK).unlink()
    assert commit.sweep(tmp_path) == [staging.name]
    assert list(tmp_path.iterdir()) == []


def test_a_tag_that_stepped_aside_for_a_save_that_died_gets_its_name_again(tmp_path, caplog):
    tag = save_tag(tmp_path, 3, best='best')
    tag.rename(tmp_path / '.old-ckpt_epoch_best')  # killed between the two renames
    commit.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [tag]
    assert discovery.resolve(str(tag)) == tag
    assert f'{tag}: the save that was to replace it died' in caplog.text


def test_the_next_save_gives_a_tag_that_stepped_aside_its_name_again(tmp_path):
    tag = save_tag(tmp_path, 3, best='best')
    tag.rename(tmp_path / '.old-ckpt_epoch_best')
    commit.abandon(commit.begin(tmp_path, 'ckpt_epoch_best'))
    assert list(tmp_path.iterdir()) == [tag]


def test_a_tag_that_stepped_aside_is_left_to_a_save_that_is_alive(tmp_path, other_process):
    tag = save_tag(tmp_path, 3, best='best')
    process, staging = other_process(tmp_path, tag.name)
    aside = tmp_path / '.old-ckpt_epoch_best'
    tag.rename(aside)
    commit.sweep(tmp_path)
    assert aside.exists()
    _kill(process)
    assert commit.sweep(tmp_path) == [staging.name]
    assert list(tmp_path.iterdir()) == [tag]


def test_what_stepped_aside_and_is_not_whole_gets_no_name(tmp_path):
    tag = save_tag(tmp_path, 3, best='best')
    aside = tag.rename(tmp_path / '.old-ckpt_epoch_best')
    (aside / SHARD).unlink()
    commit.sweep(tmp_path)
    assert not tag.exists()


def test_sweeping_leaves_what_is_not_ours(tmp_path):
    for name in ('ckpt_epoch_3', '.git', '.lockfile', '.old', 'logs'):
        (tmp_path / name).mkdir()
    (tmp_path / '.hidden').write_text('x')
    before = sorted(tmp_path.iterdir())
    assert commit.sweep(tmp_path) == []
    assert sorted(tmp_path.iterdir()) == before


def test_a_tag_that_latest_cannot_name_is_not_published(tmp_path):
    old = save_tag(tmp_path, 0, content='old')
    save_tag(tmp_path, 1)
    (tmp_path / 'latest').unlink()
    (tmp_path / 'latest').mkdir()
    for tag in ('ckpt_epoch_0', 'ckpt_epoch_2'):
        staging, files = stage_tag(tmp_path, tag, 'new')
        with pytest.raises(OSError, match=f'{tmp_path}/latest'):
            commit.commit(staging, Manifest(make_header(tag, 0, 3), files), latest=True)
        assert (old / SHARD).read_text() == 'old'  # at once, not by the next save's sweep
        commit.abandon(staging)
    assert (old / SHARD).read_text() == 'old'
    names = ['ckpt_epoch_0', 'ckpt_epoch_1', 'latest']
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_where_nothing_can_be_put_back_the_error_says_what_is_there(tmp_path, monkeypatch):
    save_tag(tmp_path, 0)
    staging, files = stage_tag(tmp_path, 'ckpt_epoch_1')

    def fail(folder):
        # What comes after the rename fails, and the way back too.
        staging.path.mkdir()
        (staging.path / 'in the way').touch()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(commit, 'flush', fail)
    said = f'{tmp_path}/ckpt_epoch_1: saved, but {tmp_path}/latest may name another tag: .*error'
    with pytest.raises(CheckpointError, match=said):
        commit.commit(staging, Manifest(make_header('ckpt_epoch_1', 1, 2), files), latest=True)
    assert (tmp_path / 'latest').read_text() == 'ckpt_epoch_0'


def test_a_save_that_cannot_begin_on_a_full_disk_leaks_nothing(tmp_path, full_disk):
    before = sorted(os.listdir(full_disk)), len(os.listdir('/proc/self/fd'))
    for _ in range(3):
        with pytest.raises(OSError, match=f"No space left on device: '{full_disk}/") as caught:
            commit.begin(full_disk, 'ckpt_epoch_1')
        assert caught.value.errno == errno.ENOSPC
    assert (sorted(os.listdir(full_disk)), len(os.listdir('/proc/self/fd'))) == before


def test_what_cannot_be_unlinked_is_a_warning(tmp_path, caplog, monkeypatch):
    staging, files = stage_tag(tmp_path, 'ckpt_epoch_0')
    real = Path.unlink

    def unlink(path, missing_ok=False):
        if path.name.startswith('.lock-'):
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        real(path, missing_ok)

    monkeypatch.setattr(Path, 'unlink', unlink)
    tag = _commit(staging, files)
    assert discovery.problem(tag) is None
    assert 'could not remove' in caplog.text


def test_files_that_rank_0_does_not_see_are_named(tmp_path):
    staging, files = stage_tag(tmp_path, 'ckpt_epoch_0')
    sizes = discovery.file_sizes(staging.path)
    commit.require_files(staging, files, sizes)
    elsewhere = {**files, 'zero_pp_rank_1.pt': FileEntry(5, 'a' * 32)}
    with pytest.raises(CheckpointError, match=r'zero_pp_rank_1\.pt is missing.*must be one dir'):
        commit.require_files(staging, elsewhere, sizes)
    with pytest.raises(CheckpointError, match=f'{SHARD} has 6 bytes, not 7'):
        commit.require_files(staging, files, {SHARD: 6})
    commit.abandon(staging)


def test_saves_are_counted_over_all_tags_that_exist(tmp_path):
    assert commit.next_sequence(tmp_path) == 1
    save_tag(tmp_path, 7)
    best = save_tag(tmp_path, 7, best='best')
    assert commit.next_sequence(tmp_path) == 3
    save_tag(tmp_path, 2)
    assert commit.next_sequence(tmp_path) == 4
    (best / 'manifest.json').write_text('{')
    assert commit.next_sequence(tmp_path) == 4


def test_only_epoch_tags_are_pruned_and_whole(tmp_path):
    for epoch in range(4):
        save_tag(tmp_path, epoch, max_accuracy=(1.0, 9.0, 9.0, 9.0)[epoch])
    save_tag(tmp_path, 0, best='best')
    (tmp_path / 'global_step5').mkdir()
    removed = commit.prune(tmp_path, [KeepNewest(1), KeepBest(1)])
    assert removed == ['ckpt_epoch_0', 'ckpt_epoch_2']
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'ckpt_epoch_1', 'ckpt_epoch_3', 'ckpt_epoch_best', 'global_step5', 'latest',
    ]  # fmt: skip


def test_a_tag_that_cannot_be_removed_is_a_warning(tmp_path, caplog):
    # Root may remove anything, so a read-only directory proves nothing; but a name so long that no
    # name can be made of it for the trash stops anyone.
    stays = tmp_path / ('ckpt_epoch_' + '1' * 240)
    stays.mkdir()
    (stays / SHARD).touch()
    for epoch in range(2):
        save_tag(tmp_path, epoch)
    assert commit.prune(tmp_path, [KeepNewest(1)]) == ['ckpt_epoch_0']
    assert f'could not remove {stays}: ' in caplog.text
    assert stays.exists()
    assert (tmp_path / 'ckpt_epoch_1').exists()


def test_a_rewound_run_is_told_once_what_stays_of_later_training(tmp_path, caplog):
    policies = [KeepNewest(1), KeepLater()]
    for epoch in (8, 9, 3, 4):
        save_tag(tmp_path, epoch)
        commit.prune(tmp_path, policies)
    # 8 went when 9 was saved, and 3 when 4 was: what had been saved before it is older training
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt_epoch_4', 'ckpt_epoch_9', 'latest']
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f'{tmp_path}: ckpt_epoch_3 was saved after tags of later training, of which ckpt_epoch_9 '
        'stay until this run has come as far'
    )
    assert ' and none go; auto resume takes what was saved last' in record.getMessage()
    assert discovery.newest(tmp_path) == (tmp_path / 'ckpt_epoch_4', None)
    save_tag(tmp_path, 9, content='again')
    commit.prune(tmp_path, policies)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt_epoch_9', 'latest']
    assert len(caplog.records) == 1


def test_a_run_that_was_rewound_on_purpose_is_told_what_goes(tmp_path, caplog):
    for epoch in (7, 8, 9, 3):
        save_tag(tmp_path, epoch)
    assert commit.prune(tmp_path, [KeepNewest(1), KeepLater(2)]) == ['ckpt_epoch_7']
    assert 'ckpt_epoch_8, ckpt_epoch_9 stay' in caplog.text
    assert 'and ckpt_epoch_7 go' in caplog.text
