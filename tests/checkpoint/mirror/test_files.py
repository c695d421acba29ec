"""Tags in a second directory: what is whole there, what comes back, what stays, what is passed."""

import logging
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from internvl_ds.checkpoint.choice import auto_resume_helper, choose
from internvl_ds.checkpoint.mirror import fetching, places
from internvl_ds.checkpoint.mirror import uploads as module
from internvl_ds.checkpoint.mirror.places import Place, mark_complete, place_of_name
from internvl_ds.checkpoint.mirror.store import Store
from internvl_ds.checkpoint.mirror.uploads import uploads
from internvl_ds.checkpoint.tag.discovery import read_latest, read_manifest, resolve
from internvl_ds.checkpoint.tag.manifest import FILE_NAME
from internvl_ds.checkpoint.tag.retention import KeepBest, KeepNewest
from internvl_ds.checkpoint.tag.verify import damage_of_tag
from internvl_ds.dist.group import current_group
from internvl_ds.errors import CheckpointError
from tests.checkpoint.mirror import tagging
from tests.checkpoint.mirror.tagging import config_of, place_of, save, upload, whole
from tests.harness.counts import trials

KILLS = trials('INTERNVL_DS_MIRROR_KILLS', 6, soak=60)


@pytest.fixture(autouse=True)
def own_uploads(monkeypatch):
    """The uploads of a test end with it."""
    monkeypatch.setattr(module, '_PAUSE', 0.02)
    monkeypatch.setattr(fetching, '_PAUSE', 0.02)
    yield
    uploads()._close()
    for kind in [kind for kind in current_group().parts if kind.__name__ in ('_Uploads', '_Last')]:
        del current_group().parts[kind]


@pytest.fixture
def mirror(tmp_path):
    return f'file://{tmp_path}/mirror'


def resumed(output, mirror):
    """The name of what auto resume takes, which is whole."""
    path = auto_resume_helper(str(output), config=config_of(output, mirror))
    if path is None:
        return None
    assert damage_of_tag(Path(path)) == []
    return Path(path).name


def test_a_lost_output_comes_back_byte_for_byte(tmp_path, mirror):
    output, new = tmp_path / 'out', tmp_path / 'new'
    tags = [save(output, 0), save(output, 1), save(output, 1, best='best')]
    upload(output, mirror, *tags)
    assert whole(mirror) == ['ckpt_epoch_0', 'ckpt_epoch_1', 'ckpt_epoch_best']
    for tag in tags:  # a copy of what lies there is a tag
        folder = tmp_path / 'mirror' / place_of(tag).name
        assert resolve(str(folder)) == folder
        assert damage_of_tag(folder) == []
    before = {p.relative_to(output): p.read_bytes() for p in tags[1].rglob('*') if p.is_file()}
    assert resumed(new, mirror) == 'ckpt_epoch_1' == read_latest(new)
    after = {p.relative_to(new): p.read_bytes() for p in new.rglob('ckpt_*/**/*') if p.is_file()}
    assert after == before
    assert [p.name for p in new.iterdir() if p.name.startswith('.s')] == []
    # A save after it is newer than all that the mirror has.
    assert read_manifest(save(new, 0)).header.sequence > place_of(tags[2]).sequence


def test_the_newer_of_both_places_is_taken(tmp_path, mirror, caplog):
    output, new = tmp_path / 'out', tmp_path / 'new'
    first, second = save(output, 5), save(output, 3)
    upload(output, mirror, first)
    assert resumed(output, mirror) == 'ckpt_epoch_3'  # not in the mirror
    shutil.copytree(output, new)
    upload(output, mirror, second, save(output, 4))
    assert resumed(new, mirror) == 'ckpt_epoch_4'
    assert {p.name for p in new.glob('ckpt_*')} == {'ckpt_epoch_3', 'ckpt_epoch_4', 'ckpt_epoch_5'}
    # Of the same save the one at hand is taken, unless it is damaged.
    (new / 'ckpt_epoch_4' / 'a.bin').write_bytes(b'x')
    assert resumed(new, mirror) == 'ckpt_epoch_4'
    shutil.rmtree(tmp_path / 'mirror')
    assert resumed(new, mirror) == 'ckpt_epoch_4'
    assert resumed(tmp_path / 'fresh', mirror) is None


def test_the_same_command_with_a_resume_goes_on_from_the_mirror(tmp_path, mirror):
    output, new, log = tmp_path / 'out', tmp_path / 'new', logging.getLogger('test')
    origin = save(tmp_path / 'origin', 0)
    upload(output, mirror, save(output, 1))
    config = config_of(new, mirror, MODEL__RESUME=str(origin), EVAL_MODE=True)
    assert choose(config, log) == origin
    assert not new.exists()
    assert choose(config_of(new, mirror, MODEL__RESUME=str(origin)), log) == new / 'ckpt_epoch_1'


def lists_another_path(folder, place):
    """A manifest with right digests that would be written elsewhere."""
    text = (folder / FILE_NAME).read_text().partition(',\n "xxh3_128"')[0]
    text = text.replace('"a.bin"', '"../a.bin"')
    data = places.parse_manifest.__globals__['_with_digest'](text).encode()
    (folder / FILE_NAME).write_bytes(data)
    mark_complete(Store(f'file://{folder.parent}'), place, data)


HARMS = {
    'truncated': (lambda d, p: os.truncate(d / 'a.bin', 10), 'has 10 bytes, not'),
    'longer': (lambda d, p: (d / 'a.bin').open('ab').write(b'x'), 'bytes, not'),
    'changed': (lambda d, p: (d / 'under/b.bin').open('r+b').write(b'XX'), 'b.bin: damaged'),
    'missing': (lambda d, p: (d / 'under/b.bin').unlink(), 'FileNotFoundError'),
    'no manifest': (lambda d, p: (d / FILE_NAME).unlink(), 'FileNotFoundError'),
    'another manifest': (lambda d, p: (d / FILE_NAME).write_text('{}'), 'is not what .complete'),
    'a part of the mark': (lambda d, p: os.truncate(f'{d}.complete', 0), 'is not what .complete'),
    'elsewhere': (lists_another_path, 'which is no file of a tag'),
    'another save': (
        lambda d, p: [
            os.rename(f'{d}{end}', d.parent / f'{p._replace(sequence=9).name}{end}')
            for end in ('', '.complete')
        ],
        'is of save',
    ),
    'no mark': (lambda d, p: os.unlink(f'{d}.complete'), None),
}  # fmt: skip


@pytest.mark.parametrize('harm', HARMS)
def test_what_is_not_whole_is_passed_over_with_its_reason(tmp_path, mirror, caplog, harm):
    output = tmp_path / 'out'
    tags = [save(output, 0), save(output, 1)]
    upload(output, mirror, *tags)
    act, reason = HARMS[harm]
    act(tmp_path / 'mirror' / place_of(tags[1]).name, place_of(tags[1]))
    caplog.clear()
    assert resumed(tmp_path / 'new', mirror) == 'ckpt_epoch_0'
    warnings = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    assert len(warnings) == (reason is not None)
    assert all('passed over' in line and reason in line and '\n' not in line for line in warnings)
    assert sorted(p.name for p in (tmp_path / 'new').glob('[!.]*')) == ['ckpt_epoch_0', 'latest']
    assert not (tmp_path / 'a.bin').exists()


def test_a_mirror_that_does_not_answer_is_an_error_at_the_start(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(Store, 'names', lambda self, folder='': time.sleep(5))
    monkeypatch.setattr(fetching, '_STALL', 0.2)
    with pytest.raises(CheckpointError, match='may have a newer tag than OUTPUT'):
        resumed(tmp_path / 'new', mirror)


def test_names_of_others_are_no_tags(tmp_path, mirror):
    place = Place(12, 'ckpt_epoch_best', '0123456789abcdef')
    assert place_of_name(place.name) == place
    for name in (
        '..',
        'x',
        place.tag,
        f'{place.name}x',
        f'1-{place.tag}-{place.save}',
        f'00000012-ckpt_epoch_../x-{place.save}',
        f'000000012-{place.tag}-{place.save}',
    ):
        assert place_of_name(name) is None, name  # fmt: skip


def test_retention_holds_in_the_mirror_and_parts_of_dead_uploads_go(tmp_path, mirror):
    output = tmp_path / 'out'
    policies = [KeepNewest(2), KeepBest(1)]
    dead = tmp_path / 'mirror' / Place(0, 'ckpt_epoch_9', 'f' * 16).name
    dead.mkdir(parents=True)
    (tmp_path / 'mirror' / 'notes').mkdir()
    for epoch, accuracy in enumerate((10, 60, 60, 60, 60)):
        upload(output, mirror, save(output, epoch, max_accuracy=accuracy), policies=policies)
        upload(output, mirror, save(output, epoch, best='best'))
    assert whole(mirror) == ['ckpt_epoch_1', 'ckpt_epoch_3', 'ckpt_epoch_4', 'ckpt_epoch_best']
    left = {p.name for p in (tmp_path / 'mirror').iterdir()}
    assert 'notes' in left
    assert len(left) == 9


def test_the_mark_goes_first(tmp_path, mirror, monkeypatch):
    output = tmp_path / 'out'
    tags = [save(output, 0), save(output, 1)]
    upload(output, mirror, *tags)
    remove = Store.remove

    def fail_for_folders(store, name):
        if not name.endswith('.complete'):
            raise OSError('cut')
        remove(store, name)

    monkeypatch.setattr(Store, 'remove', fail_for_folders)
    with pytest.raises(OSError, match='cut'):
        places.Retention(Store(mirror)).prune([KeepNewest(1)], [])
    assert whole(mirror) == ['ckpt_epoch_1']


def test_a_failing_mirror_is_one_warning_and_later_tags_arrive(tmp_path, mirror, caplog):
    (tmp_path / 'mirror').write_text('in the way')
    output = tmp_path / 'out'
    upload(output, mirror, save(output, 0), wait=1)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    cannot = [line for line in warnings if 'cannot upload' in line]
    assert len(cannot) == 1
    assert 'ckpt_epoch_0: rank 0 cannot upload it to file:///' in cannot[0]
    assert 'training goes on' in cannot[0]
    assert 'ckpt_epoch_0 not uploaded when the run ends' in warnings[-1]
    assert not any('\n' in line for line in warnings)
    (tmp_path / 'mirror').unlink()
    upload(output, mirror, save(output, 1))
    assert whole(mirror) == ['ckpt_epoch_1']


def test_a_newer_tag_goes_before_one_that_waits_and_what_was_pruned_is_let_go(
    tmp_path, mirror, monkeypatch
):
    output, go, begun = tmp_path / 'out', threading.Event(), []
    tags = [save(output, epoch, size=epoch + 1) for epoch in range(4)]
    put = Store.put

    def slow(store, name, source, size):
        begun.append(name.split('/')[0])
        assert go.wait(20)
        put(store, name, source, size)

    monkeypatch.setattr(Store, 'put', slow)
    uploads().begin(config_of(output, mirror))
    uploads().submit(output, place_of(tags[0]), None)
    while not begun:
        time.sleep(0.01)
    assert uploads().held().keeps(list(map(_entry, tags))) == {'ckpt_epoch_0'}
    for tag in tags[1:]:
        uploads().submit(output, place_of(tag), None)
    shutil.rmtree(tags[1])
    go.set()
    uploads().finish()
    order = [place_of_name(name.removesuffix('.complete')).tag for name in dict.fromkeys(begun)]
    assert list(dict.fromkeys(order)) == ['ckpt_epoch_0', 'ckpt_epoch_3', 'ckpt_epoch_2']
    assert whole(mirror) == ['ckpt_epoch_0', 'ckpt_epoch_2', 'ckpt_epoch_3']
    assert uploads().held().keeps(list(map(_entry, tags[:1]))) == set()


def _entry(tag):
    return places.EpochTag(0, 0, tag.name)


@pytest.mark.soak
@pytest.mark.timeout(120 + 5 * KILLS)
def test_a_rank_killed_in_the_middle_of_an_upload_leaves_no_tag_that_counts(tmp_path, mirror):
    output = tmp_path / 'out'
    tag = save(output, 0)
    upload(output, mirror, tag)
    newer = save(output, 1)
    _upload_on_two_ranks(output, f'{mirror}_counted', newer, (0, 0))
    steps = [int((output / f'steps_{rank}').read_text()) for rank in range(2)]
    assert min(steps) > 3
    points = [(rank, step) for rank in range(2) for step in range(1, steps[rank] + 1)]
    stride = max(1, len(points) // KILLS)
    for dies in [(0, steps[0]), *points[::stride]][:KILLS]:
        _upload_on_two_ranks(output, mirror, newer, dies)
        new = tmp_path / f'new_{dies[0]}_{dies[1]}'
        assert whole(mirror) == ['ckpt_epoch_0'], dies
        assert resumed(new, mirror) == 'ckpt_epoch_0', dies
        shutil.rmtree(tmp_path / 'mirror' / place_of(newer).name, ignore_errors=True)
    # What they left is no hindrance, and goes.
    upload(output, mirror, newer, policies=[KeepNewest(1)])
    assert whole(mirror) == ['ckpt_epoch_1']
    assert len(list((tmp_path / 'mirror').iterdir())) == 2


def _upload_on_two_ranks(output, mirror, tag, dies):
    pids = [tagging.upload_or_die(output, mirror, tag, rank, dies) for rank in range(2)]
    first = pids.pop(dies[0])
    os.waitpid(first, 0)
    if dies[1]:
        time.sleep(0.3)  # the other one comes as far as it can
        tagging.end(*pids)
    else:
        os.waitpid(pids[0], 0)
