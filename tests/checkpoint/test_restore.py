"""Whole weights by name into a plain module. Engines: tests/checkpoint/test_api.py."""

import pytest
import torch
from torch import nn

from internvl_ds.checkpoint.restore import load_weights, model_shapes, require_same_model
from internvl_ds.errors import CheckpointMismatch


def test_weights_are_cast_to_what_the_module_computes_with():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2).to(torch.bfloat16)
    load_weights(target, source.state_dict(), 'here')
    assert torch.equal(target.weight, source.weight.to(torch.bfloat16))


def test_another_model_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    weights = {**model.state_dict(), '0.weight': torch.zeros(4, 3), 'extra': torch.zeros(1)}
    del weights['1.running_mean']
    with pytest.raises(CheckpointMismatch) as error:
        load_weights(model, weights, 'out/ckpt_epoch_3')
    text = str(error.value)
    assert text.startswith('out/ckpt_epoch_3: made for another model')
    assert '1 keys are not in it: 1.running_mean' in text
    assert '1 keys are not in the model: extra' in text
    assert '0.weight (4, 3) -> (2, 3)' in text
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_only_the_first_keys_are_named():
    saved = {f'block.{i}': (1,) for i in range(40)}
    with pytest.raises(CheckpointMismatch, match=r'40 keys .*: block.0, .* block.4, \.\.\.$'):
        require_same_model(saved, {}, 'x')


def test_shapes_of_a_model():
    model = nn.BatchNorm1d(2)
    assert model_shapes(model) == {
        'weight': (2,), 'bias': (2,), 'running_mean': (2,), 'running_var': (2,),
        'num_batches_tracked': (),
    }  # fmt: skip
