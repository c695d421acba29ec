"""The 22K -> 1K rows, and what becomes of a head of another length."""

import logging

import pytest
import torch
from timm.data import ImageNetInfo
from torch import nn

from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained import convert_22k_head_to_1k, head
from internvl_ds.pretrained.head import fit_head, other_layers
from internvl_ds.pretrained.transforms import TensorSpec

logger = logging.getLogger('test_pretrained')


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(8, classes)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def bias(n):
    return {'head.bias': torch.arange(float(n))}


def bias_spec(n):
    return {'head.bias': TensorSpec(torch.Size((n,)), torch.float32)}


def test_rows():
    rows = head.imagenet_22k_rows()
    assert rows.dtype == torch.int64
    assert rows.shape == (1000,)
    assert len(set(rows.tolist())) == 999
    assert rows.min() >= 0
    assert rows.max() < 21841


@pytest.mark.parametrize(
    ('label', 'wnid', 'word'),
    [
        (0, 'n01440764', 'tench'),
        (1, 'n01443537', 'goldfish'),
        (207, 'n02099601', 'golden retriever'),
        (281, 'n02123045', 'tabby'),
        (849, 'n04398044', 'teapot'),
        (999, 'n15075141', 'toilet tissue'),
    ],
)
def test_rows_of_known_classes(label, wnid, word):
    info = ImageNetInfo('imagenet-22k')
    row = int(head.imagenet_22k_rows()[label])
    assert info.index_to_label_name(row) == wnid
    assert word in info.index_to_description(row)


def test_every_other_row_has_the_wordnet_id_of_its_class():
    of_1k, of_22k = ImageNetInfo('imagenet-1k'), ImageNetInfo('imagenet-22k')
    rows = head.imagenet_22k_rows().tolist()
    pairs = [
        (of_1k.index_to_label_name(i), of_22k.index_to_label_name(r)) for i, r in enumerate(rows)
    ]
    assert [(a, b) for a, b in pairs if a != b] == [('n04399382', 'n04398044')]


def test_the_class_that_is_absent_takes_its_neighbour():
    assert ImageNetInfo('imagenet-1k').index_to_label_name(850) == 'n04399382'
    assert head.imagenet_22k_rows()[850] == 11136
    assert head.imagenet_22k_rows()[849] == 11136


def test_a_changed_result_does_not_change_the_next():
    head.imagenet_22k_rows().zero_()
    assert head.imagenet_22k_rows()[850] == 11136


@pytest.mark.parametrize('lead', [(), (2,), (2, 3)])
def test_slice_22k_logits(lead):
    logits = torch.randn(*lead, 21841)
    out = head.slice_22k_logits(logits)
    assert out.shape == (*lead, 1000)
    for label in (0, 850, 999):
        assert torch.equal(out[..., label], logits[..., int(head.imagenet_22k_rows()[label])])


def test_slice_22k_logits_of_another_length():
    with pytest.raises(PretrainedError, match=r'shape \(2, 1000\).* not 21841'):
        head.slice_22k_logits(torch.zeros(2, 1000))


def fit(state, specs, rand_init, layers=('head',)):
    return fit_head(other_layers(layers, state, specs), rand_init, state, specs)


@pytest.mark.parametrize('rand_init', [False, True])
@pytest.mark.parametrize(('state', 'specs'), [({}, bias_spec(10)), (bias(10), {}), ({}, {})])
def test_a_head_without_a_bias_on_one_side_stays(state, specs, rand_init):
    assert fit(state, specs, rand_init) == (state, ())


@pytest.mark.parametrize('rand_init', [False, True])
def test_a_head_of_the_same_length_stays(rand_init):
    state = bias(1000)
    assert fit(state, bias_spec(1000), rand_init).state is state


@pytest.mark.parametrize(('have', 'want'), [(1000, 10), (1000, 21841), (21841, 10)])
def test_lengths_that_no_setting_allows(have, want):
    with pytest.raises(PretrainedError) as caught:
        fit(bias(have), bias_spec(want), rand_init=False)
    text = str(caught.value)
    assert f'{have} classes in the checkpoint, {want} in the model' in text
    assert f'MODEL.NUM_CLASSES to {have}' in text
    assert 'TRAIN.RAND_INIT_FT_HEAD' in text


@pytest.mark.parametrize(('subset', 'have', 'lacks'), [
    ('imagenet-12k', 11821, 6), ('imagenet-21k-miil', 11221, 8), ('imagenet-22k-ms', 21842, 0),
])  # fmt: skip
def test_classes_of_1k_that_a_list_lacks_start_from_zeros_with_a_warning(subset, have, lacks):
    result = fit({'head.bias': torch.arange(1.0, have + 1)}, bias_spec(1000), rand_init=False)
    theirs = list(ImageNetInfo(subset).label_names())
    of_1k = list(ImageNetInfo('imagenet-1k').label_names())
    if 'n04399382' not in theirs:  # teddy, which has a stand-in
        of_1k[850] = 'n04398044'
    expected = [theirs.index(wnid) + 1.0 if wnid in theirs else 0.0 for wnid in of_1k]
    assert result.state['head.bias'].tolist() == expected
    assert expected.count(0) == lacks
    warnings = [note.text for note in result.notes if note.is_warning]
    text = f'head: {lacks} classes of ImageNet-1K are not among the {have}, and start from zeros'
    assert [warning.startswith(text) for warning in warnings] == ([True] if lacks else [])


def large(classes):
    """The state of a model with a head of so many classes."""
    return {
        'head.weight': torch.randn(classes, 2),
        'head.bias': torch.randn(classes),
        'headless': torch.zeros(1),
    }


def small():
    """What a model of 1000 classes has for ``large``."""
    shapes = {'head.weight': (1000, 2), 'head.bias': (1000,), 'headless': (1,)}
    return {key: TensorSpec(torch.Size(shape), torch.float32) for key, shape in shapes.items()}


def test_a_dropped_head():
    state = large(7)
    before = dict(state)
    dropped = fit(state, small(), rand_init=True)
    assert dropped.state == {'headless': state['headless']}
    assert len(dropped.notes) == 1
    assert state == before


@pytest.mark.parametrize(
    ('classes', 'subset'),
    [(21841, 'imagenet-22k'), (21843, 'imagenet-21k-goog'), (21842, 'imagenet-22k-ms')],
)
def test_rows_of_a_larger_imagenet(classes, subset):
    state = large(classes)
    taken = fit(state, small(), rand_init=False)
    assert list(taken.state) == list(state)
    index = {wnid: row for row, wnid in enumerate(ImageNetInfo(subset).label_names())}
    rows = [
        index[wnid if wnid in index else 'n04398044']
        for wnid in ImageNetInfo('imagenet-1k').label_names()
    ]
    for key in ('head.weight', 'head.bias'):
        assert torch.equal(taken.state[key], state[key][rows])
    assert taken.state['headless'] is state['headless']
    assert [note.text for note in taken.notes] == [
        f'head {classes} -> 1000: took its ImageNet-1K rows'
    ]
    if classes == 21841:
        assert rows == head.imagenet_22k_rows().tolist()


@pytest.mark.parametrize('wrap', [lambda model: model, Wrapper], ids=['plain', 'wrapped'])
@pytest.mark.parametrize('grad', [True, False])
def test_convert_22k_head(wrap, grad):
    net = Net(21841).bfloat16()
    net.head.requires_grad_(grad)
    weight, bias = net.head.weight, net.head.bias
    model = wrap(net)
    assert convert_22k_head_to_1k(model, logger) is model
    rows = head.imagenet_22k_rows()
    for new, old in ((net.head.weight, weight), (net.head.bias, bias)):
        assert isinstance(new, nn.Parameter)
        assert new is not old
        assert new.dtype == torch.bfloat16
        assert new.requires_grad is grad
        assert new.is_leaf
        assert torch.equal(new, old.detach()[rows])
    assert net.head.out_features == 1000
    assert net.head(torch.zeros(2, 8, dtype=torch.bfloat16)).shape == (2, 1000)


def test_convert_without_a_bias():
    net = Net(5)
    net.head = nn.Linear(8, 21841, bias=False)
    convert_22k_head_to_1k(net, logger)
    assert net.head.weight.shape == (1000, 8)
    assert net.head.bias is None


def test_convert_leaves_other_heads(caplog):
    net = Net(1000)
    before = list(net.parameters())
    assert convert_22k_head_to_1k(net, logger) is net
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))
    net.head = nn.Identity()
    convert_22k_head_to_1k(net, logger)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        'the head of Net has 1000 rows, not 21841: unchanged',
        'Net has no head with a weight: unchanged',
    ]
