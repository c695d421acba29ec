"""An output directory of tags: real files, no ranks."""

import json
import os

import pytest

from internvl_ds.checkpoint import store
from internvl_ds.checkpoint.manifest import Manifest
from internvl_ds.errors import CheckpointError, CheckpointNotFound


def _save(output, epoch, best=None, content='weights'):
    tag = f'ckpt_epoch_{epoch if best is None else best}'
    staging = store.begin(output, tag)
    (staging / 'mp_rank_00_model_states.pt').write_text(content)
    manifest = Manifest(
        tag=tag, epoch=epoch, sequence=store.next_sequence(output), zero_stage=0, world_size=1,
        precision='fp32', global_steps=1, files=store.file_sizes(staging),
    )  # fmt: skip
    store.commit(output, manifest)
    if best is None:
        store.write_latest(output, tag)
    return output / tag


def test_nothing_there_is_a_fresh_start(tmp_path):
    assert store.newest(tmp_path / 'nowhere') is None
    assert store.newest(tmp_path) is None
    (tmp_path / 'log_rank0.txt').write_text('x')
    assert store.newest(tmp_path) is None


def test_latest_decides(tmp_path):
    first, second = _save(tmp_path, 0), _save(tmp_path, 1)
    assert store.newest(tmp_path) == (second, None)
    store.write_latest(tmp_path, first.name)
    assert store.newest(tmp_path) == (first, None)


def test_a_missing_empty_or_dangling_latest_is_said_and_the_newest_tag_taken(tmp_path):
    _save(tmp_path, 0)
    second = _save(tmp_path, 1)
    latest = tmp_path / 'latest'
    latest.unlink()
    path, warning = store.newest(tmp_path)
    assert path == second
    assert 'there is no' in warning
    assert 'resuming from ckpt_epoch_1 instead' in warning
    latest.write_text('')
    assert 'is empty' in store.newest(tmp_path).warning
    latest.write_text('ckpt_epoch_7')
    assert 'names ckpt_epoch_7, and' in store.newest(tmp_path).warning
    assert store.newest(tmp_path).path == second


def test_a_tag_that_lost_a_file_is_passed_over(tmp_path):
    first, second = _save(tmp_path, 0), _save(tmp_path, 1)
    (second / 'mp_rank_00_model_states.pt').unlink()
    path, warning = store.newest(tmp_path)
    assert path == first
    assert 'mp_rank_00_model_states.pt is missing' in warning
    with pytest.raises(CheckpointError, match='is missing; it cannot be loaded'):
        store.resolve(str(second))


def test_traces_without_a_whole_tag_are_an_error_not_a_fresh_start(tmp_path):
    for text in ('', 'ckpt_epoch_3'):
        (tmp_path / 'latest').write_text(text)
        with pytest.raises(CheckpointNotFound, match='no whole one is left'):
            store.newest(tmp_path)


def test_an_original_file_is_found_where_there_are_no_tags(tmp_path):
    for age, name in ((2, 'ckpt_epoch_9.pth'), (1, 'ckpt_epoch_10.pth')):
        (tmp_path / name).write_text('x')
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert store.newest(tmp_path) == (tmp_path / 'ckpt_epoch_10.pth', None)
    tag = _save(tmp_path, 0)
    assert store.newest(tmp_path).path == tag


def test_other_whole_tags_are_better_than_a_silent_start_from_scratch(tmp_path):
    best = _save(tmp_path, 4, best='best')
    path, warning = store.newest(tmp_path)
    assert path == best
    assert 'there is no' in warning
    assert 'resuming from ckpt_epoch_best instead' in warning
    epoch = _save(tmp_path, 2)
    assert store.newest(tmp_path) == (epoch, None)


def test_a_tag_of_plain_deepspeed_is_found_without_latest(tmp_path):
    plain = tmp_path / 'global_step100'
    plain.mkdir()
    (plain / 'mp_rank_00_model_states.pt').touch()
    assert store.newest(tmp_path).path == plain


def test_resolve(tmp_path):
    tag = _save(tmp_path, 0)
    assert store.resolve(str(tag)).path == tag
    assert store.resolve(str(tmp_path)).path == tag
    assert store.resolve(str(tag / 'manifest.json')).path == tag / 'manifest.json'
    with pytest.raises(CheckpointNotFound, match=r'ckpt_epoch_5: no such .* has ckpt_epoch_0'):
        store.resolve(str(tmp_path / 'ckpt_epoch_5'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(CheckpointNotFound, match='empty: a directory without any checkpoint'):
        store.resolve(str(tmp_path / 'empty'))


def test_overwriting_a_tag_keeps_nothing_of_the_old_one(tmp_path):
    _save(tmp_path, 3, best='best', content='old')
    tag = _save(tmp_path, 5, best='best', content='new')
    assert (tag / 'mp_rank_00_model_states.pt').read_text() == 'new'
    assert store.read_manifest(tag).epoch == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt_epoch_best']


def test_a_tag_that_stepped_aside_for_a_save_that_died_comes_back(tmp_path):
    tag = _save(tmp_path, 3, best='best')
    aside = tmp_path / '.old-ckpt_epoch_best'
    tag.rename(aside)  # killed between the two renames
    assert store.resolve(str(tag)).path == aside
    store.begin(tmp_path, 'ckpt_epoch_best')
    assert store.resolve(str(tag)).path == tag


def test_latest_may_name_a_tag_that_stepped_aside(tmp_path):
    _save(tmp_path, 0)
    tag = _save(tmp_path, 1)
    tag.rename(tmp_path / '.old-ckpt_epoch_1')
    assert store.newest(tmp_path) == (tmp_path / '.old-ckpt_epoch_1', None)


def test_a_leftover_of_a_dead_save_is_never_read(tmp_path):
    staging = store.begin(tmp_path, 'ckpt_epoch_0')
    (staging / 'mp_rank_00_model_states.pt').write_text('half')
    assert store.newest(tmp_path) is None
    assert list(store.begin(tmp_path, 'ckpt_epoch_0').iterdir()) == []


def test_a_broken_manifest_is_named(tmp_path):
    tag = _save(tmp_path, 0)
    (tag / 'manifest.json').write_text('{')
    with pytest.raises(CheckpointError, match=r'manifest.json: cannot be read'):
        store.resolve(str(tag))
    (tag / 'manifest.json').write_text(json.dumps({'format': 99}))
    with pytest.raises(CheckpointError, match='upgrade internvl_ds'):
        store.resolve(str(tag))


def test_a_tag_that_cannot_be_removed_is_a_warning(tmp_path, caplog, monkeypatch):
    for epoch in range(3):
        _save(tmp_path, epoch)
    # root may remove anything, so a read-only directory proves nothing here: fail the rename
    original = type(tmp_path).rename

    def rename(self, target):
        if self.name == 'ckpt_epoch_0':
            raise PermissionError(13, 'Permission denied', str(self))
        return original(self, target)

    monkeypatch.setattr(type(tmp_path), 'rename', rename)
    assert store.prune(tmp_path, 1) == ['ckpt_epoch_1']
    assert 'could not remove the old checkpoint' in caplog.text
    assert 'ckpt_epoch_0' in caplog.text
