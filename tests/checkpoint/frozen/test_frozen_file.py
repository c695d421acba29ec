"""The file of frozen parameters: known before it is written."""

import os

import pytest
import torch
from safetensors.torch import load_file

from internvl_ds.checkpoint.frozen.frozen_bytes import entry_of
from internvl_ds.checkpoint.frozen.frozen_file import FrozenFile, joined, write
from internvl_ds.checkpoint.frozen.model_file import KEY, split
from internvl_ds.checkpoint.tag.hashing import hash_file
from internvl_ds.errors import CheckpointError

TENSORS = {
    'a': torch.rand(7, 3),
    'b': torch.rand(4, 6).t(),  # in another order than it lies in memory
    'c': torch.rand(5).bfloat16(),
    'd': torch.tensor(2),
    'e': torch.ones(3, dtype=torch.bool),
}


def test_size_and_digest_are_those_of_the_file(tmp_path):
    entry = entry_of(TENSORS)
    write(FrozenFile(entry, TENSORS), tmp_path / 'x')
    assert hash_file(tmp_path / 'x') == entry
    assert os.listdir(tmp_path) == ['x']
    loaded = load_file(tmp_path / 'x')
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize('name', TENSORS)
def test_one_other_bit_is_another_digest(name):
    other = {n: t.contiguous().clone() for n, t in TENSORS.items()}
    assert entry_of(other) == entry_of(TENSORS)
    other[name].view(-1).view(torch.uint8)[0] ^= 1
    assert entry_of(other).digest != entry_of(TENSORS).digest


def test_what_changed_since_is_not_written(tmp_path):
    changing = {'a': torch.rand(7)}
    frozen = FrozenFile(entry_of(changing), changing)
    changing['a'].add_(1)
    with pytest.raises(CheckpointError, match='frozen parameters changed while'):
        write(frozen, tmp_path / 'x')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('name', ['../x', 'x', None, 'frozen_rank_0-0.safetensors'])
def test_a_model_file_names_no_other_file(tmp_path, name):
    left, _ = split({'module': dict(TENSORS)}, {'a'}, {}, sharded=False)
    left[KEY]['file'] = name
    with pytest.raises(CheckpointError, match=r'm\.pt: says that its frozen parameters are in'):
        joined(tmp_path, tmp_path / 'm.pt', left)


@pytest.mark.parametrize(
    'apart',
    [
        1, [], {}, {'sharded': False}, {'sharded': False, 'omitted': 1},
        {'sharded': False, 'omitted': {'a': [1]}, 'digests': {}},
        {'sharded': False, 'omitted': {'a': [['/etc/passwd', ['a'], ['float32']], 'float32', [7],
         0, 7, 7]}, 'digests': {'/etc/passwd': 'x'}},
    ],
)  # fmt: skip
def test_what_says_nonsense_of_its_parameters_is_one_error(tmp_path, apart):
    content = {'module': {}, KEY: apart}
    with pytest.raises(CheckpointError, match=f'{tmp_path}'):
        joined(tmp_path, tmp_path / 'm.pt', content)
