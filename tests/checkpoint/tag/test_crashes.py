"""A power cut at any moment of a save leaves the old tag or the new one, whole, and found."""

import errno
import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from internvl_ds.checkpoint.frozen import frozen_file
from internvl_ds.checkpoint.frozen.frozen_file import FrozenFile
from internvl_ds.checkpoint.frozen.sharing import Sharing
from internvl_ds.checkpoint.tag import commit, discovery, owner
from internvl_ds.checkpoint.tag.hashing import (
    flush_and_hash,
    write_hashed,
)
from internvl_ds.checkpoint.tag.manifest import Identity, Manifest
from internvl_ds.checkpoint.tag.retention import KeepNewest
from internvl_ds.checkpoint.tag.unchanged import Unchanged
from internvl_ds.checkpoint.tag.verify import damage_of_tag
from internvl_ds.errors import CheckpointNotFound
from tests.harness import crashing
from tests.harness.crashes import Recorder, write_tree
from tests.harness.ranks import run_ranks
from tests.harness.tags import make_header, save_safetensors, save_tag, save_tensors

OLD, NEW, DONE = 1, 2, 'saved'
# Names that discovery never looks into.
UNREAD = ('.staging-', '.trash-', '.lock-', '.internvl_ds-')


def save(output, tag, sequence, latest, unchanged=None):
    """Stages a tag of one file of each kind that a save writes, and commits it.

    One of them is always the same: ``unchanged`` links what an earlier call with it has written.
    """
    unchanged = unchanged or Unchanged()
    unchanged.begin(Identity(tag, str(sequence), 0), 1)
    staging = commit.begin(output, tag)
    tensor = torch.full((64,), float(sequence))
    (staging.path / 'zero_to_fp32.py').write_text(f'sequence = {sequence}\n' * 20)
    nvme = staging.path / 'offloaded_tensors' / 'rank_0' / 'd.swp'  # where DeepSpeed copies to
    nvme.parent.mkdir(parents=True)
    nvme.write_bytes(bytes([sequence]) * 99)
    files = {
        'a.bin': write_hashed(staging.path / 'a.bin', lambda f: f.write(bytes([sequence]) * 99)),
        'b.pt': save_tensors({'x': tensor}, staging.path / 'b.pt'),
        'c.safetensors': save_safetensors({'x': tensor}, staging.path / 'c.safetensors'),
        'zero_to_fp32.py': flush_and_hash(staging.path / 'zero_to_fp32.py'),
        'offloaded_tensors/rank_0/d.swp': flush_and_hash(nvme),
    }
    files |= share(output, staging.path, sequence)
    files['e.pt'] = unchanged.write({'x': torch.ones(64)}, staging.path / 'e.pt')
    manifest = Manifest(make_header(tag, None, sequence), files)
    final = commit.commit(staging, manifest, latest=latest)
    unchanged.committed(final)
    return final


def share(output, staging, sequence):
    """Writes a model file whose frozen parameters, the same in all saves, stand apart."""
    sharing = Sharing(output, staging, frozenset('w'), {}, sharded=False, seen=set())
    state = {'module': {'w': torch.ones(64), 'x': torch.full((4,), float(sequence))}}
    files = {}
    for path, value in sharing.parts(state, staging / 'mp_rank_00_model_states.pt'):
        if isinstance(value, FrozenFile):
            frozen_file.write(value, path)
        else:
            files[path.name] = save_tensors(value, path)
    return {**files, **sharing.files}


def whole(tag):
    """The sequence number of a tag whose every byte is as it was written; else None."""
    if discovery.problem(tag) is None and damage_of_tag(tag) == []:
        return discovery.read_header(tag).sequence
    return None


def newest(output):
    try:
        found = discovery.newest(output)
    except CheckpointNotFound as error:
        return str(error)
    return None if found is None else whole(found.path)


def best(output):
    return whole(discovery.present(output / 'ckpt_epoch_best'))


def named_by_latest(output):
    name = discovery.read_latest(output)
    return None if name is None else whole(discovery.present(output / name))


# What is there before, what is saved, and how the tag is looked for afterwards.
SAVES = {
    'the first tag': (None, 'ckpt_epoch_0', True, newest),
    'the next tag': ('ckpt_epoch_0', 'ckpt_epoch_1', True, newest),
    'the same tag again': ('ckpt_epoch_0', 'ckpt_epoch_0', True, newest),
    'another best': ('ckpt_epoch_best', 'ckpt_epoch_best', False, best),
    'the next tag, without links': ('ckpt_epoch_0', 'ckpt_epoch_1', True, newest),
}


def require_found(state, events, done, saved, output):
    """What discovery finds in a state of the disk after a power cut."""
    before, _, latest, find = SAVES[saved]
    found = find(output)
    allowed = {NEW} if events > done else {NEW, OLD if before else None}
    assert found in allowed, (events, sorted(state), found)
    if latest and (before or events > done):
        assert named_by_latest(output) in {OLD, NEW}, (events, sorted(state))
    elif latest:
        assert named_by_latest(output) in {None, NEW}, (events, sorted(state))


def no_links(*_, **__):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.fixture
def after_a_reboot(monkeypatch):
    """Whoever owned something before the power cut is no process of this boot."""
    monkeypatch.setattr(owner, '_machine', functools.partial(str, 'another boot'))


@pytest.fixture
def copy():
    """Where a state of the disk is made: in memory, because there are many."""
    with tempfile.TemporaryDirectory(dir='/dev/shm') as folder:
        yield Path(folder, 'copy')


@pytest.mark.parametrize('saved', SAVES)
def test_a_power_cut_leaves_the_old_tag_or_the_new_one(
    tmp_path, copy, saved, after_a_reboot, monkeypatch
):
    before, tag, latest, _ = SAVES[saved]
    output = tmp_path / 'output'
    output.mkdir()
    if 'without links' in saved:
        monkeypatch.setattr(os, 'link', no_links)
    unchanged = Unchanged()
    if before:
        save(output, before, OLD, latest, unchanged)
    with Recorder(output) as recorder:
        save(output, tag, NEW, latest, unchanged)
        recorder.note(DONE)
        if latest:
            commit.prune(output, [KeepNewest(1)])
    assert bool(unchanged.linked) == bool(before and 'without links' not in saved)
    done = [event.call for event in recorder.events].index(DONE)
    seen = set()
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)  # of the copies, which go at once
    for index, (events, state) in enumerate(recorder.states()):
        readable = frozenset(item for item in state.items() if not item[0].startswith(UNREAD))
        if readable in seen and index % 10:
            continue
        seen.add(readable)
        write_tree(state, copy)
        require_found(state, events, done, saved, copy)
        commit.sweep(copy, age=0)  # as the next save does first
        require_found(state, events, done, saved, copy)
        shutil.rmtree(copy)
    assert index > 200


def test_a_tag_is_on_disk_before_it_has_its_name(tmp_path):
    with Recorder(tmp_path) as recorder:
        save(tmp_path, 'ckpt_epoch_0', NEW, True)
    assert recorder.unflushed('ckpt_epoch_0') == []
    events = [event for event in recorder.events if event.call in ('rename', 'fsync')]
    at = next(i for i, event in enumerate(events) if event.path == 'ckpt_epoch_0')
    before, after = events[:at], events[at + 1 :]
    # The text of `latest` needs no space any more, and its name follows that of the tag.
    assert [e.call for e in before if '/' not in e.path and e.path.endswith('.tmp')] == ['fsync']
    assert [(e.call, e.path) for e in after if e.path in ('', 'latest')][:1] == [('fsync', '')]
    assert next(e.path for e in after if e.call == 'rename') == 'latest'
    assert [(e.call, e.path) for e in after][-1] == ('fsync', '')


@pytest.mark.ranks
def test_all_of_an_engines_tag_is_on_disk_before_it_has_its_name(tmp_path):
    (found,) = run_ranks(crashing.unflushed, 1, tmp_path, root=tmp_path, stages=[0, 3])
    assert found == [[], []]


def test_a_disk_that_is_full_at_the_flush_of_latest_publishes_nothing(tmp_path, monkeypatch):
    old = save_tag(tmp_path, 0)
    real, output = os.fsync, os.stat(tmp_path).st_ino

    def fsync(descriptor):
        place = os.readlink(f'/proc/self/fd/{descriptor}')
        if os.path.dirname(place) == str(tmp_path) and place.endswith('.tmp'):
            assert not (tmp_path / 'ckpt_epoch_1').exists()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(OSError, match='No space left'):
        save_tag(tmp_path, 1)
    assert discovery.newest(tmp_path) == (old, None)
    assert output == os.stat(tmp_path).st_ino
