"""What may be written to, and what writing a state dict reports."""

import pytest
import torch
from torch import nn

from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained import apply, convert_22k_head_to_1k
from internvl_ds.zero.lazy_tensor import Flat


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
        (lambda model: model.to('meta'), r'without memory \(meta device\): norm.weight'),
    ],
    ids=['engine', 'module of an engine', 'meta'],
)


@REFUSED
def test_what_is_not_plain_is_refused(make, words):
    with pytest.raises(PretrainedError, match=words) as caught:
        apply.require_writable(make(Net()), 'some_call')
    assert 'some_call' in str(caught.value)


@REFUSED
@pytest.mark.parametrize('wrap', [lambda model: model, Wrapper], ids=['plain', 'wrapped'])
def test_convert_refuses_it_too(make, words, wrap):
    with pytest.raises(PretrainedError, match=words):
        convert_22k_head_to_1k(wrap(make(Net())), None)


def test_plain_is_accepted():
    apply.require_writable(Net(), 'some_call')
    apply.require_writable(Wrapper(Net()), 'some_call')


def test_values_are_written_in_the_dtype_of_the_model():
    model = Net().bfloat16()
    value = torch.full((4,), 1 + 2.0**-9)
    apply.write(model, [('norm.weight', value), ('norm.bias', Flat.of('w', value))])
    assert torch.equal(model.norm.weight, value.bfloat16())
    assert torch.equal(model.norm.bias, value.bfloat16())


def test_what_torch_refuses_is_a_pretrained_error():
    with pytest.raises(
        PretrainedError, match=r'cannot be loaded: .*\s+size mismatch for norm.weight'
    ):
        apply.load_state(Net(), {'norm.weight': torch.zeros(2)})


def test_the_grids_that_a_model_says_of_its_embeddings_and_tables():
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.window_size = (7, 5)
    model.attn.relative_position_bias_table = nn.Parameter(torch.zeros(13 * 9, 3))
    model.patch_embed = nn.Module()
    model.patch_embed.grid_size = (4, 2)
    model.num_prefix_tokens = 1
    model.pos_embed = nn.Parameter(torch.zeros(1, 9, 6))
    specs = apply.describe(model)
    assert specs['attn.relative_position_bias_table'][2:] == ((13, 9), 0)
    assert specs['pos_embed'][2:] == ((4, 2), 1)
    model.no_embed_class = True
    assert apply.describe(model)['pos_embed'][2:] == (None, 0)  # of another size than it says
    model.pos_embed = nn.Parameter(torch.zeros(1, 8, 6))
    assert apply.describe(model)['pos_embed'][2:] == ((4, 2), 0)
