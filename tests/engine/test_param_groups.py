"""Merging of parameter groups, and the schedule of each tensor's lr on 2 real ranks."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from internvl_ds.engine.param_groups import (
    merge_param_groups,
    remap_scheduler,
    require_trained_groups,
)
from internvl_ds.errors import ConfigError
from tests.checkpoint import schedule
from tests.harness.ranks import run_ranks


def _tensors(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(i + 1)) for i in range(count)]


def test_groups_of_equal_settings_are_merged_and_names_kept():
    a, b, c, d = _tensors(4)
    optimizer = torch.optim.AdamW(
        [
            {'params': [a], 'lr': 0.1, 'weight_decay': 0.0, 'name': 'a'},
            {'params': [b], 'lr': 0.2, 'weight_decay': 0.0, 'name': 'b'},
            {'params': [], 'lr': 0.3, 'weight_decay': 0.0, 'name': 'none'},
            {'params': [c], 'lr': 0.1, 'weight_decay': 0.0, 'name': 'c'},
            {'params': [d], 'lr': 0.1, 'weight_decay': 0.05, 'name': 'd'},
        ]
    )
    merged = merge_param_groups(optimizer, {a: 'a', b: 'b', c: 'c', d: 'd'})
    assert merged.names == [['a'], ['b'], [], ['c'], ['d']]
    assert merged.origins == [0, 1, 4]
    assert merged.now == [['a', 'c'], ['b'], ['d']]
    got = [(g['param_names'], g['lr'], g['weight_decay']) for g in optimizer.param_groups]
    assert got == [(['a', 'c'], 0.1, 0.0), (['b'], 0.2, 0.0), (['d'], 0.1, 0.05)]
    assert optimizer.param_groups[0]['params'][1] is c
    assert 'name' not in optimizer.param_groups[0]


def test_groups_that_share_an_lr_during_warm_up_only_are_not_merged():
    a, b = _tensors(2)
    optimizer = torch.optim.SGD([{'params': [a], 'lr': 0.1}, {'params': [b], 'lr': 0.2}])
    scheduler = CosineLRScheduler(
        optimizer, t_initial=10, warmup_t=2, warmup_lr_init=0.01, t_in_epochs=False
    )
    assert optimizer.param_groups[0]['lr'] == optimizer.param_groups[1]['lr']
    origins = merge_param_groups(optimizer, {}).origins
    remap_scheduler(scheduler, origins, 2)
    scheduler.step_update(2)
    assert [g['lr'] for g in optimizer.param_groups] == pytest.approx(
        [v * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 0.2)).item()) for v in (0.1, 0.2)]
    )


def test_the_scheduler_follows_an_empty_group_that_went():
    a, b = _tensors(2)
    optimizer = torch.optim.SGD(
        [{'params': [a], 'lr': 0.1}, {'params': [], 'lr': 0.7}, {'params': [b], 'lr': 0.2}]
    )
    scheduler = CosineLRScheduler(optimizer, t_initial=10, warmup_t=2, t_in_epochs=False)
    origins = merge_param_groups(optimizer, {}).origins
    remap_scheduler(scheduler, origins, 3)
    assert scheduler.base_values == [0.1, 0.2]
    assert scheduler.warmup_steps == [0.05, 0.1]


def test_torch_schedulers_follow_too():
    tensors = _tensors(4)
    optimizer = torch.optim.SGD(
        [{'params': [p], 'lr': lr} for p, lr in zip(tensors, (0.1, 0.1, 0.2, 0.2), strict=True)]
    )
    halve = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    origins = merge_param_groups(optimizer, {}).origins
    remap_scheduler(halve, origins, 4)
    optimizer.step()
    halve.step()
    assert [group['lr'] for group in optimizer.param_groups] == [0.05, 0.1]
    assert halve.get_last_lr() == [0.05, 0.1]


def test_tensor_lrs_that_only_print_alike_are_not_merged():
    a, b = _tensors(2)
    lrs = torch.tensor([0.12341, 0.12344])
    assert repr(lrs[0]) == repr(lrs[1])
    optimizer = torch.optim.SGD([{'params': [a], 'lr': lrs[0]}, {'params': [b], 'lr': lrs[1]}])
    assert merge_param_groups(optimizer, {}).origins == [0, 1]


@pytest.mark.first
@pytest.mark.ranks
def test_fifty_steps_of_lr_per_parameter_equal_a_plain_loop(tmp_path):
    results = run_ranks(schedule.fifty_steps, 2, tmp_path)
    for result in results:
        assert len(result['expected']) == 50
        for stage in ('0', '1', '2', '3'):
            got = result[stage]
            assert got['groups'] < got['groups_before']
            assert got['lrs'] == result['expected'], stage
            assert got['weight_decay'] == result['weight_decay'], stage
            assert got['skipped'] == 1


def test_a_group_of_frozen_parameters_only_is_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    names = {p: name for name, p in model.named_parameters()}
    groups = [{'params': [p], 'weight_decay': 0.1 * (p in set(model[0].parameters()))}
              for p in model.parameters()]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    merge_param_groups(optimizer, names)
    with pytest.raises(ConfigError, match=r'only frozen parameters \(0\.weight, 0\.bias\)'):
        require_trained_groups(optimizer)
    model[0].bias.requires_grad_(True)
    require_trained_groups(optimizer)
