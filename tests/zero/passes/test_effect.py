"""What a trial says of gradients of zero."""

import pytest
import torch
from timm.optim import Lookahead
from torch import nn

from internvl_ds.engine import optimizer_trial
from internvl_ds.engine.optimizer_trial import effect_of_zeros


def made(kind, **settings):
    k = settings.pop('k', None)
    inner = kind([nn.Parameter(torch.ones(3))], lr=0.1, **settings)
    return inner if k is None else Lookahead(inner, k=k)


def effect(optimizer):
    return tuple(effect_of_zeros(optimizer, optimizer.param_groups[0]))


@pytest.mark.parametrize('k', [2, 3, 6, 10, 20])
def test_lookahead_averages_in_every_kth_update_only(k):
    # From the k-th update on it has slow weights of a parameter with gradients of zero.
    assert effect(made(torch.optim.SGD, k=k)) == (True, False, False)


@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize('decay', [1e-4, 1e-7])
def test_a_small_weight_decay_is_seen(kind, decay):
    assert effect(made(kind, weight_decay=decay)) == (False, False, False)


@pytest.mark.parametrize('momentum', [0.9, 1e-4])
def test_momentum_that_comes_to_the_same_is_seen(momentum):
    assert effect(made(torch.optim.SGD, momentum=momentum)) == (True, True, False)


def test_a_schedule_of_settings_and_a_count_of_updates_need_no_new_trials():
    optimizer = made(torch.optim.AdamW, k=6, betas=(0.9, 0.99))
    group = optimizer.param_groups[0]
    for update in range(20):
        group['lookahead_step'] = update
        group['weight_decay'], group['betas'] = 0.1 + update / 100, (0.8 + update / 100, 0.99)
        assert not effect_of_zeros(optimizer, group).never
    assert len(optimizer_trial._effects[optimizer]) <= 2
    group['weight_decay'] = 0.0
    assert effect_of_zeros(optimizer, group).never
