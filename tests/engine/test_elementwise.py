"""Optimizers that ZeRO may give pieces of tensors; others would train on with wrong numbers."""

import pytest
import timm.optim
import torch
from torch import nn

from internvl_ds.engine.elementwise import require_elementwise, require_own_adagrad
from internvl_ds.errors import ConfigError
from tests.harness.ranks import run_ranks
from tests.zero import guarding

ELEMENTWISE = {
    'SGD': {'momentum': 0.9, 'nesterov': True},
    'Adam': {'amsgrad': True},
    'AdamW': {},
    'Adamax': {},
    'RMSprop': {'centered': True, 'momentum': 0.9},
    'NAdam': {},
    'RAdam': {},
    'Rprop': {},
    'ASGD': {},
    'Adadelta': {},
}
TIMM = ('lion', 'adan', 'nadamw', 'adabelief', 'madgrad', 'laprop', 'adopt', 'rmsproptf', 'sgdw')
WHOLE = (
    'lamb', 'lars', 'sgdp', 'adamp', 'novograd', 'mars', 'muon', 'adafactor', 'adafactorbv',
)  # fmt: skip


CPU = torch.device('cpu')


def groups():
    """One without weight decay, with which LARS adapts nothing, and one with it."""
    return [
        {'params': [nn.Parameter(torch.ones(2, 3))], 'weight_decay': decay} for decay in (0.0, 0.05)
    ]


@pytest.mark.parametrize('name', ELEMENTWISE)
def test_what_moves_every_element_by_itself_may_be_partitioned(name):
    optimizer = getattr(torch.optim, name)(groups(), lr=0.0, **ELEMENTWISE[name])
    before = repr(optimizer.state_dict())
    require_elementwise(optimizer, CPU)
    assert repr(optimizer.state_dict()) == before


@pytest.mark.parametrize('name', TIMM)
def test_so_may_those_of_timm(name):
    for opt in (name, f'lookahead_{name}'):
        require_elementwise(timm.optim.create_optimizer_v2(groups(), opt=opt, lr=0.01), CPU)


@pytest.mark.parametrize('name', WHOLE)
def test_what_takes_norms_or_factors_of_whole_tensors_is_refused(name):
    optimizer = timm.optim.create_optimizer_v2(groups(), opt=name, lr=0.01)
    with pytest.raises(ConfigError, match=f'{type(optimizer).__name__} at ZeRO stages 1 to 3'):
        require_elementwise(optimizer, CPU)


def test_adagrad_would_be_replaced_by_another():
    with pytest.raises(ConfigError, match='Adagrad at ZeRO stages 1 to 3: DeepSpeed makes another'):
        require_own_adagrad(torch.optim.Adagrad(groups(), lr=0.01))


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='a torch without Muon')
def test_an_optimizer_that_takes_matrices_only_is_refused():
    with pytest.raises(ConfigError, match='Muon at ZeRO stages 1 to 3: its update of an element'):
        require_elementwise(torch.optim.Muon([nn.Parameter(torch.ones(3, 3))]), CPU)


def test_what_cannot_be_tried_is_left_to_the_user():
    optimizer = torch.optim.LBFGS([nn.Parameter(torch.ones(3))])
    require_elementwise(optimizer, CPU)


@pytest.mark.first
@pytest.mark.ranks
def test_every_way_to_an_engine_is_looked_at(tmp_path):
    for told in run_ranks(guarding.whole_tensors, 2, tmp_path):
        for way in ('initialize 1', 'initialize 2', 'initialize 3', 'register'):
            assert 'at ZeRO stages 1 to 3: its update' in told[way], way
        assert told['initialize 0'] == 'no error'
