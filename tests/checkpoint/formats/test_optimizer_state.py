"""A torch optimizer's state by parameter name. Engines: checkpoint/test_optimizer_state.py."""

import pytest
import torch
from torch import nn

from internvl_ds.checkpoint.formats.optimizer_state import state_by_order
from internvl_ds.errors import CheckpointMismatch


def _trained(make):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return dict(model.named_parameters()), optimizer.state_dict()


def _named(weights, state, names):
    return state_by_order('tag', state, [names], {n: p.detach() for n, p in weights.items()})


def test_state_and_settings_by_name():
    weights, state = _trained(lambda parameters: torch.optim.Adam(parameters, lr=0.5))
    found = _named(weights, state, ['weight', 'bias'])
    assert {name: sorted(kept) for name, kept in found.moments.items()} == {
        'weight': ['exp_avg', 'exp_avg_sq'], 'bias': ['exp_avg', 'exp_avg_sq'],
    }  # fmt: skip
    assert found.steps == {'weight': {'step': 1.0}, 'bias': {'step': 1.0}}
    assert found.settings['bias']['lr'] == 0.5
    with pytest.raises(CheckpointMismatch, match='exp_avg of parameter 0 has shape .2, 3., and '):
        _named(weights, state, ['bias', 'weight'])


def test_state_of_rows_and_columns_is_no_other_order():
    weights, state = _trained(lambda parameters: torch.optim.Adafactor(parameters, lr=0.5))
    moments = _named(weights, state, ['weight', 'bias']).moments
    assert moments['weight']['row_var'].shape == (2, 1)
    assert moments['weight']['col_var'].shape == (1, 3)


def test_state_that_is_no_tensor_is_named():
    weights, state = _trained(lambda parameters: torch.optim.Adam(parameters))
    state['state'][1] |= {'Q': [torch.eye(2)], 'R': (1,)}  # the first is named
    found = _named(weights, state, ['weight', 'bias'])
    assert found.unnamed == 'Q of bias is a list'
    assert sorted(found.moments['bias']) == ['exp_avg', 'exp_avg_sq']
    state['state'][0]['P'] = (1,)
    assert _named(weights, state, ['weight', 'bias']).unnamed == 'P of weight is a tuple'  # first


def test_other_groups_and_parameters_that_are_not_there_are_refused():
    weights, state = _trained(lambda parameters: torch.optim.Adam(parameters))
    with pytest.raises(CheckpointMismatch, match='1 parameter groups with 2 tensors, and this run'):
        state_by_order('tag', state, [['weight'], ['bias']], weights)
    with pytest.raises(CheckpointMismatch, match='1 parameters of the optimizer are not in it: x'):
        _named(weights, state, ['weight', 'x'])


def test_masters_stand_for_rounded_weights():
    weights, state = _trained(lambda parameters: torch.optim.Adam(parameters))
    exact = [parameter.detach() for parameter in weights.values()]
    rounded = {name: parameter.detach().bfloat16() for name, parameter in weights.items()}
    found = state_by_order('tag', state, [list(weights)], rounded, exact)
    assert torch.equal(found.masters['weight'].whole(), exact[0])
