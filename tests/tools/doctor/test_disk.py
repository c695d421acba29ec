"""doctor: OUTPUT on disks that are well, small, full, read-only or none."""

from __future__ import annotations

import os
import subprocess

import pytest

from internvl_ds.tools.doctor import disk
from internvl_ds.tools.doctor.probe_result import ERROR, OK, WARNING

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason='mounting a file system needs root')


@pytest.fixture
def mounted(tmp_path):
    """Mounts a tmpfs with some options; unmounts it afterwards."""
    place = tmp_path / 'mounted'
    place.mkdir()

    def mount(options):
        command = ['mount', '-t', 'tmpfs', '-o', options, 'none', str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f'mount is not allowed here: {done.stderr}')
        return place

    yield mount
    subprocess.run(['umount', '-l', str(place)], capture_output=True)


def test_a_disk_that_is_well(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, '_WRITTEN', 2**20)
    space, writing = disk.probe(tmp_path)
    assert str(tmp_path) in space.found
    assert 'free of' in space.found
    assert writing.verdict in (OK, WARNING)  # how fast it is nobody promises
    assert '1.0 MB); rename and fsync work' in writing.found
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_looked_at_where_it_would_be(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, '_WRITTEN', 2**20)
    space, _ = disk.probe(tmp_path / 'a' / 'b')
    assert f'{tmp_path} (for {tmp_path}/a/b, not there yet)' in space.found
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_output(tmp_path):
    (tmp_path / 'file').touch()
    (finding,) = disk.probe(tmp_path / 'file' / 'run')
    assert (finding.verdict, finding.found) == (ERROR, f'{tmp_path}/file is a file')


@needs_root
def test_a_small_file_system_bites(mounted):
    space, writing = disk.probe(mounted('size=8m'))
    assert space.verdict == ERROR
    assert 'tmpfs: 8.4 MB free of 8.4 MB' in space.found
    assert 'too little room' in space.advice
    assert writing.verdict in (OK, WARNING)
    assert '(4.2 MB)' in writing.found  # half of what is free, not more


@needs_root
def test_a_full_file_system_bites(mounted):
    place = mounted('size=1m')
    filler = place / 'filler'
    filler.write_bytes(b'x' * 2**20)
    space, writing = disk.probe(place)
    assert space.verdict == writing.verdict == ERROR
    assert 'No space left on device' in writing.found
    assert list(place.iterdir()) == [filler]


@needs_root
def test_no_inodes_bite(mounted):
    place = mounted('size=2g,nr_inodes=2')
    (place / 'one').touch()
    space, _ = disk.probe(place)
    assert space.verdict == ERROR
    assert space.advice.startswith('no inode for a checkpoint')


@needs_root
def test_a_read_only_file_system_bites(mounted):
    _, writing = disk.probe(mounted('ro'))
    assert writing.verdict == ERROR
    assert 'Read-only file system' in writing.found
    assert 'every save would fail' in writing.advice


def test_the_file_system_is_that_of_the_last_mount_on_the_way(tmp_path):
    mounts = (
        '22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n'
        f'30 22 0:27 / {tmp_path} rw - tmpfs tmpfs rw\n'
        f'31 22 0:28 / {tmp_path}/a\\040b rw - nfs4 server:/x rw\n'
        f'32 22 0:28 / {tmp_path} rw - overlay overlay rw\n'
    )
    (tmp_path / 'a b').mkdir()
    assert disk.filesystem(tmp_path / 'a b', mounts) == 'nfs4'
    assert disk.filesystem(tmp_path, mounts) == 'overlay'
    assert disk.filesystem(tmp_path.parent, mounts) == 'ext4'
