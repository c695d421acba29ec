"""A scheduler's state for other parameter groups."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from internvl_ds.checkpoint.schedule import fit_to_groups, set_lr_of_schedule


def test_a_group_takes_the_value_that_all_its_parameters_had():
    saved = {'base_values': [0.1, 0.2, 0.1], 't_initial': 30}
    own = {'base_values': [7.0, 8.0]}
    fitted = fit_to_groups(saved, [['a'], ['b'], ['c']], own, [['a', 'c'], ['b']])
    assert fitted == {'base_values': [0.1, 0.2], 't_initial': 30}


def test_a_group_of_parameters_that_differed_keeps_its_own():
    saved = {'base_values': [0.1, 0.2]}
    own = {'base_values': [7.0, 8.0]}
    fitted = fit_to_groups(saved, [['a'], ['b']], own, [['a', 'b'], ['new']])
    assert fitted == own
    assert fit_to_groups({'base_values': [0.1]}, [['a'], ['b']], own, [['a'], ['b']]) == own


@pytest.mark.parametrize('kind', ['timm', 'torch'])
def test_the_lr_is_the_schedules_after_so_many_updates(kind):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    if kind == 'timm':
        scheduler = CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False)
        scheduler.step_update(4)
    else:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        for _ in range(4):
            optimizer.step()
            scheduler.step()
    lr = optimizer.param_groups[0]['lr']
    optimizer.param_groups[0]['lr'] = 99.0
    set_lr_of_schedule(scheduler, optimizer.param_groups, 4)
    assert optimizer.param_groups[0]['lr'] == lr < 0.5
