"""What finding and pruning cost in a directory of 1,000 tags of 1,024 ranks each: real files.

Calls to the file system are counted, because a network file system answers each in milliseconds.
The seconds that are printed (``pytest -s``) are this machine's, and nothing depends on them.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

from internvl_ds.checkpoint.tag import commit, discovery
from internvl_ds.checkpoint.tag.manifest import FILE_NAME, FileEntry, Manifest
from internvl_ds.checkpoint.tag.retention import KeepBest, KeepEvery, KeepNewest, tags_to_prune
from internvl_ds.files import write_text
from tests.harness.tags import make_header

TAGS, RANKS = 1000, 1024
NAMES = [f'bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt' for r in range(RANKS)]
FILES = {name: FileEntry(1, f'{r:032x}') for r, name in enumerate(NAMES)}
POLICIES = [KeepNewest(3), KeepBest(2), KeepEvery(100)]

pytestmark = pytest.mark.slow


def _make_tag(output, epoch):
    """A tag with a manifest and a file of one byte for each rank."""
    tag = output / f'ckpt_epoch_{epoch}'
    tag.mkdir()
    header = make_header(
        tag.name, epoch, epoch + 1, max_accuracy=float(epoch // 2), world_size=RANKS, size=RANKS
    )
    (tag / FILE_NAME).write_text(Manifest(header, FILES).to_text())
    (tag / NAMES[0]).write_bytes(b'x')
    folder = os.open(tag, os.O_RDONLY)
    try:
        for name in NAMES[1:]:
            os.link(NAMES[0], name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


def _has_room(folder):
    status = os.statvfs(folder)
    enough_names = status.f_files == 0 or status.f_favail > TAGS * (RANKS + 2) * 1.1
    return enough_names and status.f_bavail * status.f_frsize > 1 << 30


@pytest.fixture(scope='module')
def outputs():
    """Directories by their number of tags; in memory, where there is room for a million names."""
    memory = Path('/dev/shm')
    place = memory if memory.is_dir() and _has_room(memory) else None
    root = Path(tempfile.mkdtemp(prefix='internvl_ds-scale-', dir=place))
    try:
        begun = time.perf_counter()
        made = {}
        for count in (10, TAGS):
            made[count] = root / str(count)
            made[count].mkdir()
            for epoch in range(count):
                _make_tag(made[count], epoch)
            write_text(made[count] / 'latest', f'ckpt_epoch_{count - 1}')
        print(f'\n{TAGS} tags of {RANKS} ranks made in {time.perf_counter() - begun:.1f} s')
        yield made
    finally:
        shutil.rmtree(root)


@contextmanager
def _counted():
    """Counts calls to the file system by name: of os, of open, and of directory entries.

    The interpreter reports every call of a function written in C, whoever makes it. An entry's
    ``is_dir`` is counted too, though most file systems answer it with the listing.
    """
    calls = Counter()
    of_files = {'open', 'stat', 'lstat', 'scandir', 'listdir', 'access', 'readlink'}

    def profile(frame, event, function):
        if event != 'c_call':
            return
        if isinstance(getattr(function, '__self__', None), os.DirEntry):
            calls[f'entry.{function.__name__}'] += 1
        elif function.__module__ in ('posix', 'io', '_io') and function.__name__ in of_files:
            calls[function.__name__] += 1

    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def _plan(output):
    return tags_to_prune(discovery.epoch_tags(output), POLICIES)


def test_calls_of_every_kind_are_counted(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'b').write_text('x')
    with _counted() as calls:
        discovery.file_sizes(tmp_path)
        (tmp_path / 'b').read_text()
        (tmp_path / 'b').exists()
        os.close(os.open(tmp_path / 'b', os.O_RDONLY))
    assert calls == {'scandir': 2, 'entry.is_dir': 2, 'entry.stat': 1, 'open': 2, 'stat': 1}


def test_a_resume_costs_the_files_of_one_tag_however_many_tags_there_are(outputs):
    costs = {}
    for count, output in outputs.items():
        with _counted() as costs[count]:
            found = discovery.newest(output)
        assert found == (output / f'ckpt_epoch_{count - 1}', None)
    assert costs[10] == costs[TAGS]
    # the directory of tags is not listed, no other tag is opened
    assert costs[TAGS]['scandir'] == 1
    assert costs[TAGS]['open'] == 2
    assert costs[TAGS]['entry.stat'] == RANKS
    assert costs[TAGS].total() <= 2 * RANKS + 10


@pytest.mark.parametrize('latest', [None, '', 'ckpt_epoch_5000'])
def test_a_resume_without_a_right_latest_costs_tags_plus_ranks_and_not_their_product(
    outputs, latest
):
    costs = {}
    for count, output in outputs.items():
        before = (output / 'latest').read_text()
        (output / 'latest').unlink()
        try:
            if latest is not None:
                (output / 'latest').write_text(latest)
            with _counted() as costs[count]:
                path, warning = discovery.newest(output)
        finally:
            (output / 'latest').write_text(before)
        assert path == output / f'ckpt_epoch_{count - 1}'
        assert 'instead' in warning
    per_tag = (costs[TAGS].total() - costs[10].total()) / (TAGS - 10)
    assert per_tag <= 4
    assert costs[10].total() <= 2 * RANKS + 4 * 10 + 20
    assert costs[TAGS]['entry.stat'] == RANKS


def test_a_plan_of_what_to_prune_opens_one_file_per_tag_and_lists_no_tag(outputs):
    with _counted() as calls:
        goes = _plan(outputs[TAGS])
    # 997 to 999 are the newest, 996 and 998 reached the best accuracies, and ten are hundreds
    assert len(goes) == TAGS - 4 - 10
    assert calls['open'] == TAGS
    assert calls['scandir'] == 1
    assert calls.total() <= 2 * TAGS + 10


def test_the_number_of_the_next_save_opens_one_file_per_tag_and_lists_no_tag(outputs):
    with _counted() as calls:
        assert commit.next_sequence(outputs[TAGS]) == TAGS + 1
    assert calls['open'] == TAGS
    assert calls['scandir'] == 1


def test_seconds(outputs):
    output = outputs[TAGS]
    newest_is_damaged = {f'ckpt_epoch_{TAGS - 1}': 'damaged'}
    shown = {
        'resume, latest is right': lambda: discovery.newest(output),
        'resume, latest is damaged': lambda: discovery.newest(output, newest_is_damaged),
        'plan of what to prune': lambda: _plan(output),
        'number of the next save': lambda: commit.next_sequence(output),
    }
    print()
    for name, action in shown.items():
        begun = time.perf_counter()
        assert action()
        print(f'{name}: {time.perf_counter() - begun:.3f} s')
