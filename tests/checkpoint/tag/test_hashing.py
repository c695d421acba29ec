"""Files written with their digest: real files, no ranks."""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from internvl_ds.checkpoint.tag import hashing
from internvl_ds.checkpoint.tag.hashing import (
    flush_and_hash,
    hash_file,
    write_hashed,
)
from internvl_ds.checkpoint.tag.manifest import FileEntry
from tests.harness.ranks import ROOT, base_env
from tests.harness.tags import save_safetensors, save_tensors

MIB = 1 << 20


def _entry(path):
    content = path.read_bytes()
    return FileEntry(len(content), xxhash.xxh3_128(content).hexdigest())


@pytest.mark.parametrize('size', [0, 1, MIB - 1, MIB, MIB + 1, 20 * MIB + 3])
def test_a_file_holds_what_was_written_and_its_digest_is_told(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    content = content[:size]
    path = tmp_path / 'file'
    told = write_hashed(path, lambda file: file.write(content))
    assert path.read_bytes() == content
    assert told == hash_file(path) == flush_and_hash(path) == _entry(path)


def test_many_writes_of_any_size_make_one_digest(tmp_path):
    def write(file):
        for size in (1, 7, 3 * MIB, 0, 5, MIB // 2) * 4:
            file.write(b'x' * size)
        file.write(memoryview(torch.arange(1000.0).numpy()))

    assert write_hashed(tmp_path / 'file', write) == _entry(tmp_path / 'file')


def test_a_longer_file_of_that_name_is_replaced_whole(tmp_path):
    (tmp_path / 'file').write_bytes(b'old' * MIB)
    write_hashed(tmp_path / 'file', lambda file: file.write(b'new'))
    assert (tmp_path / 'file').read_bytes() == b'new'


@pytest.mark.parametrize('mmap', [False, True])
def test_torch_loads_what_was_saved(tmp_path, mmap):
    shared = torch.randn(3, 5, dtype=torch.bfloat16)
    tree = {
        'module': {'w': torch.randn(3 * MIB), 'part': torch.arange(12).reshape(3, 4)[:, ::2]},
        'tied': [shared, shared.view(-1)],
        'none': torch.empty(0, 4),
        'scalar': torch.tensor(2.5),
        'step': 7,
    }
    path = tmp_path / 'mp_rank_00_model_states.pt'
    assert save_tensors(tree, path) == _entry(path)
    back = torch.load(path, mmap=mmap, weights_only=True)
    torch.testing.assert_close(back, tree, rtol=0, atol=0)
    assert back['tied'][0].data_ptr() == back['tied'][1].data_ptr()


@pytest.mark.parametrize('before', [True, False])
def test_other_files_of_torch_have_their_crc_as_before_also_after_a_failure(tmp_path, before):
    default = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(before)
    try:
        save_tensors({'a': torch.zeros(3)}, tmp_path / 'good.pt')
        assert torch.serialization.get_crc32_options() is before
        with pytest.raises(Exception, match=r"local object '.*<lambda>'"):
            save_tensors({'a': lambda: None}, tmp_path / 'bad.pt')
        assert torch.serialization.get_crc32_options() is before
        with pytest.raises(OSError, match='No space left'):
            save_tensors({'a': torch.zeros(3)}, _full())
        assert torch.serialization.get_crc32_options() is before
    finally:
        torch.serialization.set_crc32_options(default)


def _full():
    """A file that cannot take a byte."""
    full = Path('/dev/full')
    if not full.exists():
        pytest.skip('there is no /dev/full')
    return full


def test_a_full_disk_is_named_with_the_path_and_what_was_written():
    expected = r"No space left on device after 0 bytes: '/dev/full'"
    with pytest.raises(OSError, match=expected):
        write_hashed(_full(), lambda file: file.write(b'x' * 3 * MIB))
    with pytest.raises(OSError, match=expected):
        save_tensors({'a': torch.zeros(MIB)}, _full())


def test_a_file_that_stops_growing_is_told_with_the_bytes_that_it_has(tmp_path):
    # In a process of its own, which alone gets the limit.
    code = """
import json, resource, sys
from pathlib import Path
import torch
from internvl_ds.checkpoint.tag.hashing import write_hashed
from tests.harness.tags import save_tensors
limit = 2 * 1024 * 1024 + 5
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
errors = []
for name, write in (
    ('plain', lambda path: write_hashed(path, lambda file: file.write(bytes(5 * 1024 * 1024)))),
    ('torch', lambda path: save_tensors({'a': torch.zeros(1024 * 1024)}, path)),
):
    try:
        write(Path(sys.argv[1], name))
    except OSError as error:
        errors.append(str(error))
print(json.dumps(errors))
"""
    result = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path)],
        env=base_env(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    errors = json.loads(result.stdout)
    assert len(errors) == 2
    for name, error in zip(('plain', 'torch'), errors, strict=True):
        path = tmp_path / name
        assert f"File too large after {path.stat().st_size} bytes: '{path}'" in error
        assert path.stat().st_size == 2 * MIB + 5


@pytest.mark.filterwarnings('error::pytest.PytestUnraisableExceptionWarning')
def test_a_directory_that_is_not_there_is_named(tmp_path):
    path = tmp_path / 'nowhere' / 'file'
    with pytest.raises(FileNotFoundError, match=f'{path}'):
        write_hashed(path, lambda file: file.write(b'x'))
    with pytest.raises(FileNotFoundError, match=f'{path}'):
        save_tensors({'a': torch.zeros(3)}, path)
    with pytest.raises((OSError, SafetensorError)):
        save_safetensors({'a': torch.zeros(3)}, path)
    with pytest.raises(FileNotFoundError, match=f'{path}'):
        hash_file(path)


def test_a_write_that_fails_by_itself_says_so_and_leaves_the_file_closed(tmp_path):
    def write(file):
        file.write(b'half')
        raise ValueError('on purpose')

    with pytest.raises(ValueError, match='on purpose'):
        write_hashed(tmp_path / 'file', write)
    assert hash_file(tmp_path / 'file').size == 4


def test_safetensors_of_any_layout_read_back(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    tensors = {
        'a': whole,
        'transposed': whole.T,
        'tied': whole,
        'part': whole[1],
        'parameter': torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        'scalar': torch.tensor(3),
        'none': torch.empty(0, 2),
        'none too': torch.empty(0),
    }
    path = tmp_path / 'x.safetensors'
    assert save_safetensors(tensors, path, {'decay': '0.9'}) == _entry(path)
    back = load_file(path)
    torch.testing.assert_close(back, {n: t.detach() for n, t in tensors.items()}, rtol=0, atol=0)
    with safe_open(path, 'pt') as file:
        assert file.metadata() == {'decay': '0.9'}


def test_all_files_of_a_tag_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        save_safetensors({'a': torch.zeros(3)}, tmp_path / 'x.safetensors')
        save_tensors({'a': torch.zeros(3)}, tmp_path / 'x.pt')
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o640, 0o640]


def test_what_cannot_be_read_is_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    path = tmp_path / 'shard.pt'
    path.write_bytes(b'x' * 100_000)
    real = mmap.mmap

    def map_and_lose(descriptor, size, **more):
        mapped = real(descriptor, size, **more)
        os.truncate(path, 0)  # touching the mapping is a SIGBUS now, as on a broken disk
        return mapped

    monkeypatch.setattr(hashing.mmap, 'mmap', map_and_lose)
    with pytest.raises(OSError, match='Input/output error'):
        hashing.hash_file(path)


def test_a_kernel_that_cannot_ask_for_pages_reads_the_file(tmp_path, monkeypatch):
    path = tmp_path / 'shard.pt'
    path.write_bytes(os.urandom(3_000_000))
    expected = hashing.hash_file(path)
    monkeypatch.setattr(hashing, '_MADV_POPULATE_READ', 9999)  # as on Linux before 5.14: EINVAL
    assert hashing.hash_file(path) == expected


def test_a_file_of_another_size_is_not_read(tmp_path):
    (tmp_path / 'x').write_bytes(b'abc')
    assert hashing.hash_file(tmp_path / 'x', 4) == FileEntry(3, '')
    assert hashing.hash_file(tmp_path / 'x', 3) == hashing.hash_file(tmp_path / 'x')
    assert hashing.hash_file(tmp_path / 'x').digest == xxhash.xxh3_128(b'abc').hexdigest()
