"""Files of PyTorch and safetensors that ask for more than they are."""

import io
import os
import pickle
import struct
import time
import zipfile

import pytest
import torch
from torch import _weights_only_unpickler

from internvl_ds.checkpoint.formats.outline import outline
from internvl_ds.checkpoint.formats.shard_files import read_shard
from internvl_ds.checkpoint.formats.tensor_files import load_torch, open_safetensors
from internvl_ds.errors import CheckpointError
from tests.harness.hostile import PICKLES, peak, restart_peak, zip_of

HARMLESS = ('None', 'a tensor of 10^12', 'a set of a set', 'a storage of nothing')
BOMBS = [p for p in PICKLES if p[0] not in HARMLESS]


@pytest.mark.parametrize('read', [read_shard, outline])
@pytest.mark.parametrize(('what', 'make'), BOMBS, ids=[what for what, _ in BOMBS])
def test_a_pickle_without_measure_is_refused_at_once(tmp_path, what, make, read):
    path = tmp_path / 'mp_rank_00_model_states.pt'
    zip_of(make(), path)
    before, start = restart_peak(), time.process_time()
    with pytest.raises(CheckpointError, match=r'mp_rank_00_model_states\.pt: (cannot|refused)'):
        read(path)
    assert time.process_time() - start < 2
    assert peak() - before < 200 << 20


@pytest.mark.parametrize('read', [read_shard, outline])
def test_a_compressed_shard_is_refused_before_it_is_unpacked(tmp_path, read):
    path = tmp_path / 'x_states.pt'
    torch.save({'x': torch.zeros(10)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {e.filename: archive.read(e) for e in archive.infolist()}
    entries['archive/big'] = bytes(300 << 20)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    before = restart_peak()
    with pytest.raises(CheckpointError, match='is compressed, and says that it has'):
        read(path)
    assert peak() - before < 200 << 20


@pytest.mark.parametrize('read', [read_shard, outline])
def test_an_entry_that_claims_more_bytes_than_its_file_has_is_refused(tmp_path, read):
    path = tmp_path / 'x_states.pt'
    torch.save({'x': torch.zeros(10)}, path)
    with zipfile.ZipFile(path) as archive:
        (entry,) = (e.filename for e in archive.infolist() if '/data/' in e.filename)
    data = bytearray(path.read_bytes())
    record = data.rindex(entry.encode()) - 46  # in the central directory
    data[record + 20 : record + 28] = struct.pack('<II', 1 << 30, 1 << 30)
    path.write_bytes(data)
    before = restart_peak()
    said = rf'its entries say that they have \d+ bytes, and the file has {len(data)}'
    with pytest.raises(CheckpointError, match=said):
        read(path)
    assert peak() - before < 200 << 20


def test_much_beside_the_tensors_is_refused(tmp_path):
    zip_of(pickle.dumps({}, 2), tmp_path / 'x.pth', more=bytes(33 << 20))
    with pytest.raises(ValueError, match='beside its tensors, of 33554432 at most'):
        load_torch(tmp_path / 'x.pth')


def test_what_torch_writes_is_read_as_before(tmp_path):
    path = tmp_path / 'file.pth'
    tree = {
        'b': b'\xff\0', 'a': bytearray(b'abc'), 's': {1, 2}, 't': ((1, 2), ('x',)),
        'e': torch.zeros(1).expand(1000), 'n': None, 'f': 1.5, 'i': 1 << 100,
    }  # fmt: skip
    for zipped in (True, False):
        torch.save(tree, path, _use_new_zipfile_serialization=zipped)
        read = load_torch(path)
        assert {k: v for k, v in read.items() if k != 'e'} == {k: tree[k] for k in tree if k != 'e'}
        assert read['e'].shape == (1000,)
    # torch's own list is as it was
    assert _weights_only_unpickler._get_allowed_globals()['builtins.bytearray'] is bytearray
    torch.save(bytearray(3), path)
    assert torch.load(path, weights_only=True) == bytearray(3)


def test_an_expanded_tensor_counts_what_a_copy_would_take(tmp_path):
    torch.save({'x': torch.zeros(1).expand(10**11)}, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='more than it holds'):
        load_torch(tmp_path / 'x.pth')


@pytest.mark.parametrize('length', [0, 20 << 20, 1 << 62])
def test_a_header_out_of_proportion_is_refused(tmp_path, length):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(struct.pack('<Q', length))
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match='its header has'), open_safetensors(path):
        pass


def test_a_pickle_of_many_tensors_is_read(tmp_path):
    stream = io.BytesIO()
    torch.save({f'layer.{i}.weight': torch.zeros(1) for i in range(10_000)}, stream)
    (tmp_path / 'x.pth').write_bytes(stream.getvalue())
    assert len(load_torch(tmp_path / 'x.pth')) == 10_000
