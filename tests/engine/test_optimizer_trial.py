"""What optimizers keep, found out without a step. Loads: checkpoint/test_optimizer_state.py."""

import pytest
import torch
from timm.optim import Lamb, Lookahead, create_optimizer_v2
from torch import nn

from internvl_ds.checkpoint.optimizer_state import RunningOptimizer, SavedTensor
from internvl_ds.engine.optimizer_trial import (
    ELEMENTS,
    NUMBER,
    Trials,
    forms_of,
    like,
    state_of_optimizer,
)

# Of timm's names: one of each class that keeps something else.
TIMM = (
    'adabelief', 'adafactor', 'adafactorbv', 'adamp', 'adan', 'adopt', 'lamb', 'laprop', 'lars',
    'lion', 'madgrad', 'mars', 'muon', 'nadamw', 'novograd', 'rmsproptf', 'sgdp', 'sgdw',
)  # fmt: skip
TORCH = (
    'Adadelta', 'Adafactor', 'Adagrad', 'Adam', 'Adamax', 'ASGD', 'NAdam', 'RAdam', 'RMSprop',
    'Rprop', 'SGD',
)  # fmt: skip


def _parameters():
    shapes = (20, 3, 16, 16), (40, 20), (40,)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


@pytest.mark.parametrize('name', [*TIMM, *TORCH, 'lookahead'])
def test_what_an_optimizer_keeps_is_known_before_it_does(name):
    parameters = _parameters()
    groups = [{'params': parameters}]
    if name in TORCH:
        optimizer = getattr(torch.optim, name)(groups, lr=1e-3)
    elif name == 'lookahead':
        optimizer = Lookahead(torch.optim.AdamW(groups, lr=1e-3), k=3)
    else:
        optimizer = create_optimizer_v2(groups, opt=name, lr=1e-3, momentum=0.9)
    group = optimizer.param_groups[0]
    for update in range(5):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        for parameter in parameters:
            state = state_of_optimizer(optimizer)[parameter]
            settings = {key: value for key, value in group.items() if key != 'params'}
            saved = SavedTensor(['x'], forms_of(state, parameter.shape), settings)
            running = RunningOptimizer(optimizer)
            found = [(saved, group, parameter)]
            assert running.require_saved_by('tag', running.name, False, found) == [], update
            assert running.require_saved_by('tag', '', False, found) == [], update


@pytest.mark.parametrize(
    'make',
    [
        lambda groups: Lamb(groups, lr=1e-3),  # counts in place, in a tensor of its group
        lambda groups: Lookahead(torch.optim.AdamW(groups, lr=1e-3), k=2),  # has another step
        lambda groups: create_optimizer_v2(groups, opt='kron', lr=1e-3),  # draws random numbers
    ],
)
def test_asking_changes_nothing_of_the_optimizer_that_runs(make):
    parameter = nn.Parameter(torch.randn(40))
    optimizer = make([{'params': [parameter]}])

    def all_of_it():
        inner = getattr(optimizer, '_base_optimizer', optimizer)
        random = optimizer.rng.getstate() if hasattr(optimizer, 'rng') else None
        parts = [parameter, parameter.grad, inner.state, vars(inner), vars(optimizer), random]
        return repr(parts), torch.get_rng_state().tolist()

    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)  # for a step that is not meant
        before = all_of_it()
        assert Trials(optimizer).kept(optimizer.param_groups[0], parameter)
        assert all_of_it() == before
        if not hasattr(optimizer, 'rng'):  # kron compiles first, for a minute
            optimizer.step()


@pytest.mark.parametrize(
    ('entries', 'keys'),
    [
        ({'use_muon': True}, {'use_muon', 'momentum_buffer'}),
        ({'use_muon': False}, {'use_muon', 'step', 'exp_avg', 'exp_avg_sq'}),
    ],
)
def test_what_muon_keeps_of_a_flat_part_goes_by_its_group(entries, keys):
    optimizer = create_optimizer_v2(
        [{'params': [nn.Parameter(torch.randn(40))], **entries}], opt='muon', lr=1e-3
    )
    (group,) = optimizer.param_groups
    kept = Trials(optimizer).kept(group, group['params'][0])
    assert kept.forms.keys() == keys
    assert kept.numbers['use_muon'] is entries['use_muon']
    assert kept.exact
    assert not kept.late


def test_each_group_has_its_own_settings():
    parameters = _parameters()
    groups = [{'params': parameters[:1], 'amsgrad': True}, {'params': parameters[1:]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    running = Trials(optimizer)
    forms = {'exp_avg': ELEMENTS, 'exp_avg_sq': ELEMENTS, 'step': NUMBER}
    kept = [
        running.kept(group, parameter).forms
        for group, parameter in zip(optimizer.param_groups, parameters, strict=False)
    ]
    assert kept == [{**forms, 'max_exp_avg_sq': ELEMENTS}, forms]


def test_a_number_takes_the_form_of_another():
    for value in (3, 3.0, torch.tensor(3.0), torch.tensor(3)):
        assert repr(like(value, 0)) == '3'
        assert repr(like(value, 0.5)) == '3.0'
        assert repr(like(value, torch.tensor(0, dtype=torch.int64))) == 'tensor(3)'
        assert repr(like(value, None)) == 'tensor(3.)'
