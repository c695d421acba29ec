"""What may be written to, and what writing a state dict reports."""

import pytest
import torch
from torch import nn

from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained import apply, convert_22k_head_to_1k


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


class LooksLikeAnEngine(Wrapper):
    optimizer = None


def partitioned(model):
    model.head.weight.ds_id = 0
    return model


def of_an_engine(model):
    def hook(module, args):
        return None

    hook.__module__ = 'deepspeed.runtime.engine'
    model.register_forward_pre_hook(hook)
    return model


REFUSED = pytest.mark.parametrize(
    ('make', 'words'),
    [
        (LooksLikeAnEngine, 'before initialize: this LooksLikeAnEngine belongs to a DeepSpeed'),
        (of_an_engine, 'before initialize: this Net belongs to a DeepSpeed engine already'),
        (partitioned, r'zero\.Init are not supported by this version; build the model outside'),
        (lambda model: model.to('meta'), r'without memory \(meta device\): norm.weight'),
    ],
    ids=['engine', 'module of an engine', 'zero.Init', 'meta'],
)


@REFUSED
def test_what_is_not_plain_is_refused(make, words):
    with pytest.raises(PretrainedError, match=words) as caught:
        apply.require_plain(make(Net()), 'some_call')
    assert 'some_call' in str(caught.value)


@REFUSED
@pytest.mark.parametrize('wrap', [lambda model: model, Wrapper], ids=['plain', 'wrapped'])
def test_convert_refuses_it_too(make, words, wrap):
    with pytest.raises(PretrainedError, match=words):
        convert_22k_head_to_1k(wrap(make(Net())), None)


def test_plain_is_accepted():
    apply.require_plain(Net(), 'some_call')
    apply.require_plain(Wrapper(Net()), 'some_call')


def test_report_names_every_entry():
    state = {'norm.weight': torch.full((4,), 2.0), 'other': torch.zeros(1)}
    model = Net()
    report = apply.load_state(model, state)
    missing = ('norm.bias', 'head.weight', 'head.bias')
    assert report == apply.LoadReport(('norm.weight',), missing, ('other',))
    assert torch.equal(model.norm.weight, state['norm.weight'])


def test_what_torch_refuses_is_a_pretrained_error():
    with pytest.raises(
        PretrainedError, match=r'cannot be loaded: .*\s+size mismatch for norm.weight'
    ):
        apply.load_state(Net(), {'norm.weight': torch.zeros(2)})
