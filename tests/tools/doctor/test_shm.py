"""doctor: /dev/shm, and what dead CPU runs left there."""

from __future__ import annotations

import mmap
import os
import subprocess

import pytest

from internvl_ds.tools.doctor import shm
from internvl_ds.tools.doctor.probe_result import ERROR, OK, WARNING

NAME = 'deepspeed_allreduce_buffer_0_127.0.0.1_29500_0'


def test_nothing_left_over(tmp_path):
    room, left = shm.probe(tmp_path)
    assert 'free of' in room.found
    assert left.verdict == OK


def test_a_left_over_buffer_is_counted_and_its_owner_named(tmp_path):
    (tmp_path / NAME).write_bytes(b'x' * 2**20)
    left = shm.probe(tmp_path)[1]
    assert left.verdict == WARNING
    assert '1.0 MB in 1 buffers' in left.found
    assert shm._user(os.getuid()) in left.found
    assert f'rm {tmp_path}/deepspeed_allreduce_buffer_*' in left.advice


def test_a_buffer_that_a_process_maps_is_in_use(tmp_path):
    path = tmp_path / NAME
    path.write_bytes(b'x' * 4096)
    with path.open('r+b') as file, mmap.mmap(file.fileno(), 0):
        left = shm.probe(tmp_path)[1]
    assert (left.verdict, left.found) == (OK, '1 buffers, all in use by running processes')
    assert shm.probe(tmp_path)[1].verdict == WARNING


@pytest.mark.skipif(os.geteuid() != 0, reason='mounting a file system needs root')
def test_the_64_mib_of_a_container_bite(tmp_path):
    command = ['mount', '-t', 'tmpfs', '-o', 'size=64m', 'none', str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip('mount is not allowed here')
    try:
        room = shm.probe(tmp_path)[0]
    finally:
        subprocess.run(['umount', '-l', str(tmp_path)], check=True)
    assert room.verdict == ERROR
    assert '67.1 MB free of 67.1 MB' in room.found
    assert '--shm-size' in room.advice


def test_no_shared_memory_at_all_bites(tmp_path):
    (finding,) = shm.probe(tmp_path / 'none')
    assert finding.verdict == ERROR
    assert 'No such file or directory' in finding.found
