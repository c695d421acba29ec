"""Finding checkpoints in an output directory: real files, no ranks."""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from internvl_ds.checkpoint.tag import discovery
from internvl_ds.checkpoint.tag.manifest import FileEntry, Manifest
from internvl_ds.checkpoint.tag.retention import EpochTag
from internvl_ds.errors import CheckpointError, CheckpointNotFound
from internvl_ds.files import write_text
from tests.harness.tags import SHARD, make_header, save_tag


def _plain(output, name='global_step100'):
    """A tag as plain DeepSpeed leaves it."""
    (output / name).mkdir()
    (output / name / SHARD).touch()
    return output / name


def test_nothing_there_is_a_fresh_start(tmp_path):
    assert discovery.newest(tmp_path / 'nowhere') is None
    assert discovery.newest(tmp_path) is None
    (tmp_path / 'log_rank0.txt').write_text('x')
    (tmp_path / 'tensorboard').mkdir()
    assert discovery.newest(tmp_path) is None


def test_latest_decides(tmp_path):
    first, second = save_tag(tmp_path, 0), save_tag(tmp_path, 1)
    assert discovery.newest(tmp_path) == (second, None)
    write_text(tmp_path / 'latest', first.name)
    assert discovery.newest(tmp_path) == (first, None)


def test_a_missing_empty_or_dangling_latest_is_said_and_the_newest_tag_taken(tmp_path):
    save_tag(tmp_path, 0)
    second = save_tag(tmp_path, 1)
    latest = tmp_path / 'latest'
    latest.unlink()
    path, warning = discovery.newest(tmp_path)
    assert path == second
    assert 'there is no' in warning
    assert 'resuming from ckpt_epoch_1 instead' in warning
    latest.write_text('')
    assert 'is empty' in discovery.newest(tmp_path).warning
    latest.write_text('ckpt_epoch_7')
    assert 'names ckpt_epoch_7, and' in discovery.newest(tmp_path).warning
    assert discovery.newest(tmp_path).path == second


@pytest.mark.parametrize('content', [b'\0' * 12, b'\xff\xfe', b'/', b'.', b'..', b'x' * 5000])
def test_a_latest_that_names_nothing_sensible_is_passed_over(tmp_path, content):
    tag = save_tag(tmp_path, 0)
    (tmp_path / 'latest').write_bytes(content)
    path, warning = discovery.newest(tmp_path)
    assert path == tag
    assert str(tmp_path / 'latest') in warning
    assert 'resuming from ckpt_epoch_0 instead' in warning


def test_newest_is_what_was_saved_last_not_the_highest_epoch(tmp_path):
    for epoch in (8, 9, 10, 4):
        last = save_tag(tmp_path, epoch)
    (tmp_path / 'latest').unlink()
    assert discovery.newest(tmp_path).path == last


def test_a_tag_that_lost_a_file_is_passed_over(tmp_path):
    first, second = save_tag(tmp_path, 0), save_tag(tmp_path, 1)
    (second / SHARD).unlink()
    path, warning = discovery.newest(tmp_path)
    assert path == first
    assert f'{SHARD} is missing' in warning
    with pytest.raises(CheckpointError, match='is missing; it cannot be loaded'):
        discovery.resolve(str(second))


def test_a_tag_with_a_file_of_another_size_is_passed_over(tmp_path):
    first, second = save_tag(tmp_path, 0), save_tag(tmp_path, 1)
    (second / SHARD).write_text('half')
    path, warning = discovery.newest(tmp_path)
    assert path == first
    assert f'{SHARD} has 4 bytes, not 7' in warning


def test_a_tag_that_lost_its_manifest_is_not_taken_for_one_of_plain_deepspeed(tmp_path):
    first, second = save_tag(tmp_path, 0), save_tag(tmp_path, 1)
    (second / 'state.json').write_text('{}')
    (second / 'manifest.json').unlink()
    path, warning = discovery.newest(tmp_path)
    assert path == first
    assert 'manifest.json is missing' in warning


def test_a_tag_whose_file_is_a_link_to_nowhere_is_passed_over(tmp_path):
    first, second = save_tag(tmp_path, 0), save_tag(tmp_path, 1)
    (second / SHARD).unlink()
    (second / SHARD).symlink_to(tmp_path / 'a disk that is not mounted')
    path, warning = discovery.newest(tmp_path)
    assert path == first
    assert SHARD in warning


def test_a_tag_whose_files_are_links_is_whole(tmp_path):
    tag = save_tag(tmp_path, 0)
    (tag / SHARD).rename(tmp_path / 'elsewhere')
    (tag / SHARD).symlink_to(tmp_path / 'elsewhere')
    assert discovery.newest(tmp_path) == (tag, None)


def test_a_tag_that_the_caller_found_damaged_is_passed_over(tmp_path):
    first, second, third = (save_tag(tmp_path, epoch) for epoch in range(3))
    damaged = {third.name: 'a.pt: damaged'}
    path, warning = discovery.newest(tmp_path, damaged)
    assert path == second
    assert 'a.pt: damaged' in warning
    damaged[second.name] = 'b.pt: damaged'
    path, warning = discovery.newest(tmp_path, damaged)
    assert path == first
    assert 'a.pt: damaged; b.pt: damaged' in warning
    damaged[first.name] = 'c.pt: damaged'
    with pytest.raises(CheckpointNotFound, match=r'no whole one is left \(.*c\.pt: damaged'):
        discovery.newest(tmp_path, damaged)


def test_traces_without_a_whole_tag_are_an_error_not_a_fresh_start(tmp_path):
    for text in ('', 'ckpt_epoch_3'):
        (tmp_path / 'latest').write_text(text)
        with pytest.raises(CheckpointNotFound, match='no whole one is left'):
            discovery.newest(tmp_path)


def test_an_original_file_is_found_where_there_are_no_tags(tmp_path):
    for age, name in ((2, 'ckpt_epoch_9.pth'), (1, 'ckpt_epoch_10.pth')):
        (tmp_path / name).write_text('x')
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert discovery.newest(tmp_path) == (tmp_path / 'ckpt_epoch_10.pth', None)
    tag = save_tag(tmp_path, 0)
    assert discovery.newest(tmp_path).path == tag


def test_other_whole_tags_are_better_than_a_silent_start_from_scratch(tmp_path):
    best = save_tag(tmp_path, 4, best='best')
    path, warning = discovery.newest(tmp_path)
    assert path == best
    assert 'there is no' in warning
    assert 'resuming from ckpt_epoch_best instead' in warning
    epoch = save_tag(tmp_path, 2)
    assert discovery.newest(tmp_path) == (epoch, None)


def test_of_other_tags_the_one_saved_last_is_taken(tmp_path):
    save_tag(tmp_path, 4, best='ema_best')
    _plain(tmp_path)
    last = save_tag(tmp_path, 4, best='best')
    assert discovery.newest(tmp_path).path == last


def test_a_tag_of_plain_deepspeed_is_found_without_latest(tmp_path):
    plain = _plain(tmp_path)
    assert discovery.newest(tmp_path).path == plain


def test_latest_may_name_a_tag_of_plain_deepspeed(tmp_path):
    save_tag(tmp_path, 0)
    plain = _plain(tmp_path)
    write_text(tmp_path / 'latest', plain.name)
    assert discovery.newest(tmp_path) == (plain, None)


def test_what_is_named_is_resolved(tmp_path):
    tag = save_tag(tmp_path, 0)
    assert discovery.resolve(str(tag)) == tag
    assert discovery.resolve(str(tmp_path)) == tmp_path
    assert discovery.resolve(str(tag / 'manifest.json')) == tag / 'manifest.json'
    with pytest.raises(CheckpointNotFound, match=r'ckpt_epoch_5: no such .* has ckpt_epoch_0'):
        discovery.resolve(str(tmp_path / 'ckpt_epoch_5'))
    with pytest.raises(CheckpointNotFound, match=r'x: no such .*nowhere has none'):
        discovery.resolve(str(tmp_path / 'nowhere' / 'x'))


def test_the_directory_that_the_program_runs_in_is_resolved(tmp_path, monkeypatch):
    tag = save_tag(tmp_path, 0)
    monkeypatch.chdir(tmp_path)
    assert discovery.resolve('.').samefile(tmp_path)
    assert discovery.newest(discovery.resolve('.')).path.samefile(tag)
    monkeypatch.chdir(tag)
    assert discovery.resolve('.').samefile(tag)


def test_a_tag_that_stepped_aside_for_a_save_that_died_stands_in_for_itself(tmp_path):
    tag = save_tag(tmp_path, 3, best='best')
    aside = tmp_path / '.old-ckpt_epoch_best'
    tag.rename(aside)  # killed between the two renames
    assert discovery.resolve(str(tag)) == aside
    shutil.copytree(aside, tag)
    assert discovery.resolve(str(tag)) == tag


def test_latest_may_name_a_tag_that_stepped_aside(tmp_path):
    save_tag(tmp_path, 0)
    tag = save_tag(tmp_path, 1)
    tag.rename(tmp_path / '.old-ckpt_epoch_1')
    assert discovery.newest(tmp_path) == (tmp_path / '.old-ckpt_epoch_1', None)


def test_a_tag_that_stepped_aside_and_is_not_whole_does_not_stand_in(tmp_path):
    first, second = save_tag(tmp_path, 0), save_tag(tmp_path, 1)
    second.rename(tmp_path / '.old-ckpt_epoch_1')
    (tmp_path / '.old-ckpt_epoch_1' / SHARD).unlink()
    path, warning = discovery.newest(tmp_path)
    assert path == first
    assert 'ckpt_epoch_1 does not exist' in warning


def test_hidden_directories_are_no_tags(tmp_path):
    tag = save_tag(tmp_path, 0)
    for name in ('.staging-ckpt_epoch_1-00', '.trash-ckpt_epoch_2-00', '.old-ckpt_epoch_3'):
        shutil.copytree(tag, tmp_path / name)
    assert discovery.tags(tmp_path) == [tag]
    (tmp_path / 'latest').unlink()
    assert discovery.newest(tmp_path).path == tag


def test_the_epoch_tags_are_listed_with_what_retention_decides_by(tmp_path):
    save_tag(tmp_path, 5, max_accuracy=71.5)
    save_tag(tmp_path, 4, max_accuracy=72.5)
    save_tag(tmp_path, 5, best='best', max_accuracy=99.0)
    save_tag(tmp_path, 6, step=3)
    _plain(tmp_path, 'global_step100')
    _plain(tmp_path, 'ckpt_epoch_7')
    assert sorted(discovery.epoch_tags(tmp_path)) == [
        EpochTag(0, 7, 'ckpt_epoch_7', None),
        EpochTag(1, 5, 'ckpt_epoch_5', 71.5),
        EpochTag(2, 4, 'ckpt_epoch_4', 72.5),
        EpochTag(4, 6, 'ckpt_epoch_6_step_3', 0.0, 3, 40),
    ]


def test_what_is_a_tag_whole_or_not(tmp_path):
    ours, plain = save_tag(tmp_path, 0), _plain(tmp_path)
    (ours / SHARD).unlink()
    (tmp_path / 'tensorboard').mkdir()
    assert discovery.is_tag(ours)
    assert discovery.is_tag(plain)
    assert not discovery.is_tag(tmp_path / 'tensorboard')


def test_a_broken_manifest_is_named(tmp_path):
    tag = save_tag(tmp_path, 0)
    manifest = tag / 'manifest.json'
    for content in (b'{', b'\xff\xfe'):
        manifest.write_bytes(content)
        with pytest.raises(CheckpointError, match=r'manifest.json: (not a|cannot be read)'):
            discovery.resolve(str(tag))
        with pytest.raises(CheckpointError, match='manifest.json: '):
            discovery.read_header(tag)
        assert discovery.header_or_none(tag) is None
    manifest.write_text(json.dumps({'format': 99}))
    with pytest.raises(CheckpointError, match='upgrade internvl_ds'):
        discovery.resolve(str(tag))
    manifest.unlink()
    manifest.mkdir()
    for read in (discovery.read_manifest, discovery.read_header):
        with pytest.raises(CheckpointError, match='manifest.json: cannot be read'):
            read(tag)


def test_a_broken_manifest_is_passed_over_by_auto_resume(tmp_path):
    first, second = save_tag(tmp_path, 0), save_tag(tmp_path, 1)
    (second / 'manifest.json').write_text('{')
    path, warning = discovery.newest(tmp_path)
    assert path == first
    assert 'manifest.json: not a checkpoint manifest' in warning


def test_a_header_is_read_whatever_its_length(tmp_path):
    files = {f'zero_pp_rank_{r}_mp_rank_00.pt': FileEntry(1, 'a' * 32) for r in range(3000)}
    for versions in ({'torch': '2'}, {'torch': '2' * 5000}):
        header = make_header('ckpt_epoch_0', 0, max_accuracy=-math.inf, versions=versions)
        (tmp_path / 'manifest.json').write_text(Manifest(header, files).to_text())
        assert discovery.read_header(tmp_path) == header
        assert discovery.read_manifest(tmp_path).header == header


def test_the_sizes_of_files_in_folders_below_a_tag(tmp_path):
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    (tmp_path / 'a' / 'b' / 'x').write_text('123')
    (tmp_path / 'y').write_text('1')
    (tmp_path / 'manifest.json').write_text('{}')
    assert discovery.file_sizes(tmp_path) == {'a/b/x': 3, 'y': 1}


@pytest.mark.skipif(os.getuid() != 0, reason='only root can drop its rights')
def test_directories_that_may_not_be_read_are_passed_over():
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        output.chmod(0o755)
        first, second = save_tag(output, 0), save_tag(output, 1)
        (output / 'lost+found').mkdir(mode=0o700)
        second.chmod(0o700)
        os.seteuid(65534)
        try:
            path, warning = discovery.newest(output)
        finally:
            os.seteuid(0)
    assert path == first
    assert 'ckpt_epoch_1' in warning
    assert 'Permission denied' in warning


def test_a_tag_that_stepped_aside_is_found_without_latest(tmp_path):
    tag = save_tag(tmp_path, 3, best='best')
    aside = tmp_path / '.old-ckpt_epoch_best'
    tag.rename(aside)
    path, warning = discovery.newest(tmp_path)
    assert path == aside
    assert 'there is no' in warning


@pytest.mark.parametrize('name', ['.hidden', '../other', 'a/b', '..'])
def test_latest_names_no_tag_that_is_hidden_or_elsewhere(tmp_path, name):
    output = tmp_path / 'output'
    tag = save_tag(output, 0)
    for path in (output / '.hidden', tmp_path / 'other', output / 'a' / 'b'):
        shutil.copytree(tag, path)
    (output / 'latest').write_text(name)
    assert discovery.read_latest(output) == ''


def test_a_latest_that_is_no_file_names_nothing(tmp_path):
    save_tag(tmp_path, 0)
    (tmp_path / 'latest').rename(tmp_path / 'elsewhere')
    assert discovery.read_latest(tmp_path) is None
    (tmp_path / 'latest').symlink_to('elsewhere')
    assert discovery.read_latest(tmp_path) == ''
    (tmp_path / 'latest').unlink()
    (tmp_path / 'latest').mkdir()
    assert discovery.read_latest(tmp_path) == ''


def test_what_is_no_file_in_a_tag_has_no_size(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'dangling').symlink_to('nowhere')
    (tmp_path / 'link').symlink_to(__file__)
    sizes = discovery.file_sizes(tmp_path)
    assert sizes == {'pipe': -1, 'dangling': -1, 'link': Path(__file__).stat().st_size}


def test_a_folder_of_other_files_of_torch_is_no_checkpoint(tmp_path):
    (tmp_path / 'x.pt').touch()
    assert discovery.problem(tmp_path) == f'{tmp_path} holds no checkpoint'
    (tmp_path / 'mp_rank_00_model_states.pt').touch()
    assert discovery.problem(tmp_path) is None
    (tmp_path / 'manifest.json').symlink_to('nowhere')
    assert discovery.problem(tmp_path) == f'{tmp_path}/manifest.json: is a link to nothing'


def test_what_stepped_aside_says_for_which_tag(tmp_path):
    aside = discovery.aside_of(tmp_path / 'ckpt_epoch_best', '0123456789abcdef')
    assert discovery.tag_of_aside(aside) == 'ckpt_epoch_best'
    assert discovery.tag_of_aside(tmp_path / '.old-ckpt_epoch_best') == 'ckpt_epoch_best'
