"""State copied in memory: the copy is what was there, and stays it."""

from collections import Counter, OrderedDict, namedtuple

import pytest
import torch

from internvl_ds.checkpoint.copying.snapshot import Snapshot, tensor_bytes
from internvl_ds.files.ema_shard import EmaFile

Pair = namedtuple('Pair', 'first second')


def _tree():
    return {
        'module': torch.nn.BatchNorm1d(4).state_dict(),
        'param_groups': [{'lr': 0.1, 'betas': (0.9, 0.999), 'params': [0, 1]}],
        'state': {0: {'step': torch.tensor(3.0), 'exp_avg': torch.randn(1000)}},
        'shapes': [OrderedDict(a=torch.Size([2, 3]))],
        'pair': Pair(torch.ones(2), {'x': torch.zeros(2)}),
        'counter': Counter({30: 1}),
        'text': 'ä',
        'none': None,
    }


def _equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    return True


TENSORS = {
    'float32': torch.randn(3, 5),
    'bfloat16': torch.randn(7).bfloat16(),
    'float16': torch.randn(2, 2).half(),
    'float64': torch.randn(3, dtype=torch.float64),
    'int64': torch.arange(5),
    'uint8': torch.arange(200, dtype=torch.uint8),
    'bool': torch.tensor([True, False, True]),
    'complex': torch.randn(3, dtype=torch.complex64),
    'transposed': torch.arange(6.0).reshape(2, 3).T,
    'strided': torch.arange(20)[3::4],
    'expanded': torch.tensor([1.5]).expand(4),
    'channels_last': torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    '0-dim': torch.tensor(2.5),
    'empty': torch.empty(0),
    'empty of a shape': torch.empty(3, 0, dtype=torch.int32),
}


@pytest.mark.parametrize('name', TENSORS)
def test_a_tensor_is_copied_with_its_values_shape_and_type(name):
    tensor = TENSORS[name]
    copied = Snapshot().copy(tensor)
    assert copied.dtype == tensor.dtype
    assert copied.shape == tensor.shape
    assert torch.equal(copied, tensor)
    assert tensor.numel() == 0 or copied.data_ptr() != tensor.data_ptr()


def test_a_parameter_is_copied_as_its_values():
    copied = Snapshot().copy(torch.nn.Parameter(torch.ones(3)))
    assert not copied.requires_grad
    assert torch.equal(copied, torch.ones(3))


def test_of_a_part_of_a_tensor_only_the_part_is_copied():
    whole = torch.arange(1000.0)
    copied = Snapshot().copy(whole[10:20])
    assert torch.equal(copied, whole[10:20])
    assert copied.untyped_storage().nbytes() == 10 * 4


def test_a_tree_is_copied_with_the_types_of_its_containers():
    tree = _tree()
    copied = Snapshot().copy(tree)
    assert _equal(copied['module'], tree['module'])
    assert copied['module']._metadata == tree['module']._metadata
    assert type(copied['module']) is OrderedDict
    assert list(copied['module']) == list(tree['module'])
    assert type(copied['pair']) is Pair
    assert _equal(copied['pair'].second, tree['pair'].second)
    assert type(copied['shapes'][0]['a']) is torch.Size
    assert type(copied['param_groups'][0]['betas']) is tuple
    plain = ('param_groups', 'shapes', 'counter', 'text', 'none')
    assert {k: copied[k] for k in plain} == {k: tree[k] for k in plain}


def test_a_file_of_an_average_stays_one():
    average = EmaFile('ema_rank_0.safetensors', {'w': torch.ones(3)}, {'decay': '0.9'})
    copied = Snapshot().copy(average)
    assert type(copied) is EmaFile
    assert (copied.name, copied.metadata) == (average.name, average.metadata)
    assert torch.equal(copied.tensors['w'], average.tensors['w'])
    assert copied.tensors['w'].data_ptr() != average.tensors['w'].data_ptr()


def test_what_the_original_becomes_later_does_not_show_in_the_copy():
    tree = _tree()
    before = torch.randn(1000)
    tree['state'][0]['exp_avg'].copy_(before)
    copied = Snapshot().copy(tree)
    tree['state'][0]['exp_avg'].zero_()
    tree['state'][0]['new'] = torch.ones(1)
    tree['module']['weight'].fill_(9.0)
    tree['module']['extra'] = torch.ones(1)
    tree['param_groups'][0]['lr'] = 7.0
    tree['param_groups'][0]['params'].append(2)
    tree['pair'].first.add_(1)
    tree['counter'][60] += 1
    assert torch.equal(copied['state'][0]['exp_avg'], before)
    assert list(copied['state'][0]) == ['step', 'exp_avg']
    assert torch.equal(copied['module']['weight'], torch.ones(4))
    assert 'extra' not in copied['module']
    assert copied['param_groups'] == [{'lr': 0.1, 'betas': (0.9, 0.999), 'params': [0, 1]}]
    assert torch.equal(copied['pair'].first, torch.ones(2))
    assert copied['counter'] == Counter({30: 1})


def test_tensors_that_share_memory_are_both_copied():
    whole = torch.arange(6.0)
    first, second = Snapshot().copy([whole, whole.view(2, 3)])
    assert torch.equal(first, whole)
    assert torch.equal(second, whole.view(2, 3))


def test_torch_saves_the_copy_as_it_saves_the_original(tmp_path):
    tree = {**_tree(), 'tensors': TENSORS, 'pair': list(_tree()['pair'])}
    torch.save(Snapshot().copy(tree), tmp_path / 'copy.pt')
    torch.save(tree, tmp_path / 'original.pt')
    copied, original = (
        torch.load(tmp_path / name, weights_only=True) for name in ('copy.pt', 'original.pt')
    )
    for part in ('module', 'state', 'tensors', 'pair'):
        assert _equal(copied[part], original[part])
    assert copied['param_groups'] == original['param_groups']
    assert copied['module']._metadata == original['module']._metadata


def _addresses(tensors):
    return sorted(t.data_ptr() for t in tensors if t.numel())


def test_the_next_round_uses_the_memory_of_the_last_one():
    snapshot = Snapshot()
    tensors = list(TENSORS.values())
    first = _addresses(snapshot.copy(tensors))
    assert len(set(first)) == len(first)
    for round_ in range(3):
        snapshot.begin()
        changed = [t + 1 if t.dtype != torch.bool else ~t for t in tensors]
        copied = snapshot.copy(changed)
        assert _addresses(copied) == first, round_
        assert all(torch.equal(a, b) for a, b in zip(copied, changed, strict=True))


def test_memory_is_used_again_by_tensors_of_another_type_and_shape():
    snapshot = Snapshot()
    first = snapshot.copy(torch.arange(12.0)).data_ptr()
    snapshot.begin()
    other = torch.arange(6).reshape(2, 3)  # of as many bytes
    copied = snapshot.copy(other)
    assert copied.data_ptr() == first
    assert torch.equal(copied, other)


def test_a_round_that_grows_gets_memory_of_its_own_for_what_is_new():
    snapshot = Snapshot()
    snapshot.copy([torch.zeros(10), torch.zeros(10)])
    snapshot.begin()
    tensors = [torch.full((10,), float(i)) for i in range(3)] + [torch.ones(99)]
    copied = snapshot.copy(tensors)
    assert all(torch.equal(a, b) for a, b in zip(copied, tensors, strict=True))
    assert len(set(_addresses(copied))) == 4


def test_memory_that_cannot_be_page_locked_is_plain(monkeypatch, caplog):
    empty = torch.empty

    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError('CUDA error: out of memory\nand more')
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch, 'empty', refuse)
    assert torch.equal(Snapshot().copy(torch.ones(3)), torch.ones(3))
    assert caplog.messages == [
        'the copy for a background save is not page-locked, and takes longer: CUDA error: out of '
        'memory'
    ]


def test_the_bytes_of_a_tree():
    tree = {'a': torch.zeros(3), 'b': [torch.zeros(2, 2).half(), (torch.tensor(1),)], 'c': 'text'}
    assert tensor_bytes(tree) == 12 + 8 + 8
    assert tensor_bytes(EmaFile('x', {'w': torch.zeros(5)}, None)) == 20
    assert tensor_bytes(None) == 0
