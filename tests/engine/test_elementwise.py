"""Optimizers that an engine steps right, in pieces too; others would train wrong numbers."""

import pytest
import timm.optim
import torch
from torch import nn

from internvl_ds.engine.elementwise import require_steps
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
    'lamb', 'lars', 'sgdp', 'adamp', 'novograd', 'mars', 'adafactor', 'adafactorbv', 'cadamw',
    'clion', 'csgdw', 'cnadamw', 'cadan', 'cadoptw', 'claprop', 'crmsproptf', 'lookahead_muon',
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
    require_steps(optimizer, 3, 2, CPU)
    assert repr(optimizer.state_dict()) == before


@pytest.mark.parametrize('name', TIMM)
def test_so_may_those_of_timm(name):
    for opt in (name, f'lookahead_{name}'):
        optimizer = timm.optim.create_optimizer_v2(groups(), opt=opt, lr=0.01)
        require_steps(optimizer, 3, 2, CPU)


@pytest.mark.parametrize('name', WHOLE)
def test_what_takes_norms_or_factors_of_whole_tensors_is_refused(name):
    optimizer = timm.optim.create_optimizer_v2(groups(), opt=name, lr=0.01)
    with pytest.raises(ConfigError, match=f'{type(optimizer).__name__} at ZeRO stage 2: its upd'):
        require_steps(optimizer, 2, 2, CPU)
    require_steps(optimizer, 0, 2, CPU)


def test_adagrad_would_be_replaced_by_another():
    optimizer = torch.optim.Adagrad(groups(), lr=0.01)
    with pytest.raises(ConfigError, match='Adagrad at ZeRO stage 1: DeepSpeed makes another'):
        require_steps(optimizer, 1, 1, CPU)
    require_steps(optimizer, 0, 1, CPU)


@pytest.mark.parametrize(
    'more',
    [
        {}, {'nesterov': True, 'adjust_lr_fn': 'original'}, {'ns_coefficients': 'polar_express'},
        {'conv_mode': 'batched', 'scale_eps': True, 'safety_factor': 1.02}, {'weight_decay': 0.3},
    ],
)  # fmt: skip
def test_matrices_of_muon_are_stepped_whole(more):
    for each in ([{}], [{'use_fallback': True}, {'use_muon': True}]):
        entries = [{**group, **own} for group, own in zip(groups(), each, strict=False)]
        require_steps(timm.optim.Muon(entries, lr=0.01, **more), 2, 2, CPU)


def test_muon_of_another_algorithm_is_refused_by_its_name():
    for name in ('adamuon', 'nadamuon'):
        optimizer = timm.optim.create_optimizer_v2(groups(), opt=name, lr=0.01)
        with pytest.raises(ConfigError, match="Muon at ZeRO stage 1: its algo 'adamuon' keeps"):
            require_steps(optimizer, 1, 2, CPU)
        require_steps(optimizer, 0, 2, CPU)


def test_a_muon_of_another_version_is_refused(monkeypatch):
    step = timm.optim.Muon.step

    def with_half_the_momentum(self, closure=None):
        for group in self.param_groups:
            group['momentum'] /= 2
        step(self)
        for group in self.param_groups:
            group['momentum'] *= 2

    monkeypatch.setattr(timm.optim.Muon, 'step', with_half_the_momentum)
    with pytest.raises(ConfigError, match='Muon at ZeRO stage 1: its update of an element'):
        require_steps(timm.optim.Muon(groups(), lr=0.01), 1, 2, CPU)


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='a torch without Muon')
def test_an_optimizer_that_takes_matrices_only_is_refused_if_it_is_not_torch_s():
    matrix = nn.Parameter(torch.ones(3, 3))
    require_steps(torch.optim.Muon([matrix]), 3, 2, CPU)
    with pytest.raises(ConfigError, match='Mine at ZeRO stage 3: its update of an element'):
        require_steps(type('Mine', (torch.optim.Muon,), {})([matrix]), 3, 1, CPU)


@pytest.mark.parametrize('stage', [0, 1])
def test_what_an_engine_cannot_step_is_refused_at_each_stage(stage):
    for optimizer in (
        torch.optim.LBFGS([nn.Parameter(torch.ones(3))]),
        torch.optim.SparseAdam([nn.Parameter(torch.ones(3))]),
        timm.optim.create_optimizer_v2(groups(), opt='adahessian', lr=0.01),
    ):
        name = type(optimizer).__name__
        words = f'{name} at ZeRO stage {stage}: a trial of its step.. fails .*Error: '
        with pytest.raises(ConfigError, match=words):
            require_steps(optimizer, stage, 1, CPU)


class Noisy(torch.optim.SGD):
    """Draws from torch's generator, which has another state on each rank."""

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for parameter in group['params']:
                parameter.data += 1e-3 * torch.randn(parameter.shape)


class Counting(torch.optim.SGD):
    """Counts its calls for all groups together: with one a group they are not updates."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            group['lr'] = 0.01 / self.calls
        super().step()


class Vectors(torch.optim.SGD):
    """Takes neither matrices nor float64."""

    def step(self, closure=None):
        for group in self.param_groups:
            assert all(p.dim() == 1 and p.dtype == torch.float32 for p in group['params'])
        super().step()


def test_random_numbers_are_right_on_one_rank_alone():
    optimizer, state = Noisy(groups(), lr=0.1), torch.get_rng_state()
    require_steps(optimizer, 0, 1, CPU)
    for stage, ranks in ((0, 2), (1, 1)):
        with pytest.raises(ConfigError, match=f'Noisy at ZeRO stage {stage}: it draws random'):
            require_steps(optimizer, stage, ranks, CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_counts_calls_for_all_groups_is_refused():
    with pytest.raises(ConfigError, match='Counting at ZeRO stage 1: its update'):
        require_steps(Counting(groups(), lr=0.1), 1, 2, CPU)


def test_what_takes_no_matrix_or_no_float64_is_tried_on_what_it_takes():
    require_steps(Vectors([nn.Parameter(torch.ones(3))], lr=0.1), 3, 2, CPU)


def test_of_deepspeed_s_own_those_are_taken_that_move_each_element_by_itself():
    lamb = type('FusedLamb', (torch.optim.SGD,), {'__module__': 'deepspeed.ops.lamb.fused_lamb'})
    adam = type('FusedAdam', (torch.optim.SGD,), {'__module__': 'deepspeed.ops.adam.fused_adam'})
    require_steps(adam(groups()), 3, 2, CPU)
    require_steps(lamb(groups()), 0, 2, CPU)
    with pytest.raises(ConfigError, match='FusedLamb at ZeRO stage 1: its update'):
        require_steps(lamb(groups()), 1, 2, CPU)
    kind = {'__module__': 'deepspeed.runtime.zero.muon.muon_optimizer'}
    muon = type('MuonWithAuxAdam', (torch.optim.SGD,), kind)
    with pytest.raises(ConfigError, match='norm is taken; use timm.s .TRAIN.OPTIMIZER.NAME muon'):
        require_steps(muon(groups()), 1, 2, CPU)


@pytest.mark.first
@pytest.mark.ranks
def test_every_way_to_an_engine_is_looked_at(tmp_path):
    for told in run_ranks(guarding.whole_tensors, 2, tmp_path):
        for way in ('initialize 1', 'initialize 2', 'initialize 3', 'register'):
            assert 'Lamb at ZeRO stage ' in told[way], way
        assert told['initialize 0'] == 'no error'
