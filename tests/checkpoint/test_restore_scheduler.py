"""A scheduler's state for other parameter groups."""

import logging
import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from internvl_ds.checkpoint.restore_scheduler import (
    fit_to_groups,
    require_schedule,
    restore_schedule,
    set_lr_of_schedule,
)
from internvl_ds.errors import CheckpointError
from tests.checkpoint import schedule
from tests.harness.model import make_config
from tests.harness.ranks import run_ranks


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


@pytest.mark.parametrize(
    ('key', 'value', 'says'),
    [
        ('noise_range_t', 'x', r'file: its lr schedule gives no lr: TypeError'),
        ('noise_range_t', {'a': 1}, r'gives no lr'),
        ('noise_range_t', ['a', 3], r'gives no lr'),
        ('noise_pct', 0.0, r'noise_pct of its lr schedule is 0.0, below'),
        ('noise_pct', float('nan'), r'noise_pct of its lr schedule is nan'),
        ('warmup_t', 'x', r'warmup_t of its lr schedule'),
    ],
)
def test_a_schedule_that_can_give_no_lr_is_refused_before_anything_is_restored(key, value, says):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False)
    before = scheduler.state_dict()
    good = {**before, 'noise_range_t': [2, 5]}
    require_schedule({'lr_scheduler': good}, scheduler, 'file')
    with pytest.raises(CheckpointError, match=says):
        require_schedule({'lr_scheduler': {**good, key: value}}, scheduler, 'file')
    assert scheduler.state_dict() == before
    assert optimizer.param_groups[0]['lr'] == 0.5


class TestRestoring:
    """Of a checkpoint's schedule into the one that is configured."""

    def restore(self, scheduler, saved, caplog):
        """Whether it was restored, and what was said of it."""
        with caplog.at_level(logging.WARNING):
            restored = restore_schedule(
                make_config(), {'epoch': 3, 'lr_scheduler': saved}, scheduler, None, 'TAG',
                logging.getLogger('test'),
            )  # fmt: skip
        return restored, caplog.messages

    @pytest.fixture
    def optimizer(self):
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)

    def test_takes_all_of_one_that_is_the_same(self, optimizer, caplog):
        saved = CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False).state_dict()
        running = CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False)

        assert self.restore(running, saved, caplog) == (True, [])
        assert running.state_dict() == saved

    def test_takes_nothing_of_another_kind_and_says_so(self, optimizer, caplog):
        running = CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False)
        before = running.state_dict()

        restored, said = self.restore(running, {'last_batch_iteration': 7}, caplog)

        assert not restored
        assert running.state_dict() == before
        assert len(said) == 1
        assert said[0].startswith(
            'TAG: its lr schedule is of another kind than the configured CosineLRScheduler (it has '
            'last_batch_iteration, and no '
        )
        assert said[0].endswith('which goes on by itself')

    def test_of_torchs_kinds_begins_anew(self, optimizer, caplog):
        saved = CosineAnnealingLR(optimizer, 10).state_dict()
        restored, said = self.restore(StepLR(optimizer, 2), saved, caplog)

        assert not restored
        assert said[0].endswith('which begins anew')

    @pytest.mark.parametrize(
        ('change', 'line'),
        [
            ({'warmup_new': 3}, 'has warmup_new more, which is not restored'),
            ({'k_decay': None}, 'has no k_decay, which stays as configured'),
        ],
    )
    def test_of_another_version_takes_what_both_have(self, optimizer, caplog, change, line):
        saved = CosineLRScheduler(optimizer, t_initial=20, t_in_epochs=False).state_dict()
        saved = {k: v for k, v in {**saved, **change}.items() if k != 'k_decay' or v is not None}
        running = CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False)

        restored, said = self.restore(running, saved, caplog)

        assert restored
        assert running.t_initial == 20
        assert not hasattr(running, 'warmup_new')
        assert f'TAG: the lr schedule that was saved {line}' in said


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
def test_a_schedule_that_deepspeed_steps_goes_on_in_any_layout(tmp_path):
    for found in run_ranks(schedule.move_own_schedules, 2, tmp_path, root=tmp_path):
        straight, *resumed = found['ds_config']
        # WarmupLR: 0.01 * log(n) / log(10) after update n
        assert straight == pytest.approx([0.01 * math.log10(n) for n in range(4, 9)])
        assert resumed == [straight] * 3
        straight, same, moved, from_file = found['torch']
        assert straight == [0.005, 0.005, 0.0025, 0.0025, 0.0025]
        assert [same, moved] == [straight] * 2
        assert from_file[:5] == [0.01] * 3 + [0.005] * 2
        assert from_file[5].endswith('has no state of StepLR, which DeepSpeed steps: begun anew')
