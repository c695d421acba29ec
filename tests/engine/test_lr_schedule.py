"""Where a schedule stands, in updates and in micro-batches. No engine."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import StepLR

from internvl_ds.engine.lr_schedule import LrSchedule
from internvl_ds.errors import ConfigError


def make(kind='timm', counts=None, group=4):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    if kind == 'timm':
        scheduler = CosineLRScheduler(optimizer, t_initial=80, t_in_epochs=False)
    else:
        scheduler = StepLR(optimizer, 8)
        optimizer.step()
    return LrSchedule.of(scheduler, counts, group), optimizer.param_groups


def test_positions():
    updates, _ = make()
    assert updates.position(3, 12) == 3
    micro, groups = make(counts='micro-batches')
    micro.move(3, 10, groups)
    assert micro.position(3, 11) == 11  # one more has come
    kept = micro.state_dict(3, 11)
    assert kept == {'counts': 'micro-batches', 'position': 11, 'moved': 10, 'group': 4}
    for group, restored, position, moved in (
        (4, True, 13, 10), (6, True, 11 + 8 / 6, 10), (6, False, 18.5, 15)
    ):  # fmt: skip
        other, _ = make(counts='micro-batches', group=group)
        other.restore(kept, 3, 50, restored)
        assert other.position(4, 52) == pytest.approx(position)
        assert other.moved == moved
    old, _ = make(counts='micro-batches')
    old.restore(None, 3, 0, True)  # a tag that does not say: three whole updates
    assert (old.position(3, 2), old.moved) == (14, 12)


def test_the_originals_loop_counts_from_zero_and_skipped_updates_too():
    schedule, groups = make(counts='original')
    assert schedule.moved_to == 0
    schedule.move(1, 4, groups)
    assert (schedule.position(1, 4), schedule.moved_to) == (4, 3)
    assert schedule.is_due(skipped=True, whole=True)
    assert not schedule.is_due(skipped=False, whole=False)
    kept = schedule.state_dict(1, 7)
    assert kept == {'counts': 'original', 'position': 7, 'moved': 4, 'group': 4}
    other, _ = make(counts='original')
    other.restore(kept, 1, 0, True)
    assert (other.position(1, 1), other.moved_to) == (8, 3)
    torchs, groups = make('torch', 'original')
    for come in (4, 8):
        torchs.move(come // 4, come, groups)
        assert torchs.scheduler.last_epoch == come - 1


@pytest.mark.parametrize('counts', ['updates', 'micro-batches'])
def test_a_skipped_update_does_not_move_a_scripts_schedule(counts):
    schedule, _ = make(counts=counts)
    assert not schedule.is_due(skipped=True, whole=True)
    assert schedule.is_due(skipped=False, whole=False)


def test_torchs_steps_are_counted():
    schedule, groups = make('torch', 'micro-batches')
    for updates, come in ((1, 4), (2, 7), (3, 8)):  # the second group was short
        schedule.move(updates, come, groups)
        assert schedule.scheduler.last_epoch == come
    assert groups[0]['lr'] == pytest.approx(0.1)


@pytest.mark.parametrize('kind', ['timm', 'torch'])
def test_where_no_update_was_applied_nothing_moves(kind):
    schedule, groups = make(kind, 'updates')
    lrs = []
    for updates, come in ((1, 4), (1, 8), (2, 12), (2, 16)):
        schedule.move(updates, come, groups)
        lrs.append(groups[0]['lr'])
        if kind == 'torch':
            assert schedule.scheduler.last_epoch == updates
    assert lrs[::2] == lrs[1::2]
    assert schedule.moved == 2


@pytest.mark.parametrize('kind', ['timm', 'torch'])
def test_a_step_of_someone_else_is_seen(kind):
    schedule, groups = make(kind)
    schedule.require_untouched(groups)  # nothing was moved yet
    schedule.move(1, 4, groups)
    schedule.require_untouched(groups)
    schedule.scheduler.step() if kind == 'torch' else schedule.scheduler.step_update(4)
    with pytest.raises(ConfigError, match='the loop steps the lr_scheduler'):
        schedule.require_untouched(groups)
    schedule.restore(None, 1, 4, False)  # a load in between explains it
    schedule.require_untouched(groups)


@pytest.mark.parametrize(
    ('counts', 'group', 'updates', 'found'),
    [
        (None, 4, 10, True),
        (None, 4, 39, False),
        (None, 4, 2, False),  # of earlier epochs there is no count
        ('updates', 4, 10, False),
        (None, 1, 10, False),
        (None, 1, 30, False),  # a little longer than the training, without accumulation
    ],
)
def test_a_schedule_longer_than_the_training(counts, group, updates, found):
    schedule, _ = make(counts=counts, group=group)
    text = schedule.too_long(updates, epochs=2, all_epochs=4)  # 20 an epoch
    assert (text is not None) == found
    assert not found or 'is 20 an epoch, and an epoch has 5 updates' in text


def test_what_is_no_unit():
    with pytest.raises(ConfigError, match=r"schedule_in='steps': it is 'updates', 'micro-b"):
        make(counts='steps')
    with pytest.raises(ConfigError, match='pass both'):
        LrSchedule.of(None, 'updates', 1)
