"""The rule by which the loss scale moves, beside torch's own kernel."""

import random

import pytest
import torch

from internvl_ds.errors import InternvlDsError
from internvl_ds.zero.loss_scale import LossScale


def _torchs(skips: list[bool], scale: float, interval: int) -> list[tuple[float, int]]:
    at, tracker = torch.tensor(scale), torch.tensor(0, dtype=torch.int32)
    seen = []
    for skip in skips:
        torch._amp_update_scale_(at, tracker, torch.tensor(float(skip)), 2.0, 0.5, interval)
        seen.append((float(at), int(tracker)))
    return seen


@pytest.mark.parametrize('interval', [1, 2, 5])
@pytest.mark.parametrize('seed', range(5))
def test_it_moves_as_torchs_does(interval, seed):
    chance = random.Random(seed)
    skips = [chance.random() < 0.3 for _ in range(200)]
    scale = LossScale(scale=2.0**16, growth_interval=interval, min_scale=0.0)
    seen = []
    for skip in skips:
        scale.update(skip)
        seen.append((scale.scale, scale.growth_tracker))
    assert seen == _torchs(skips, 2.0**16, interval)


def test_it_does_not_grow_beyond_float32():
    scale = LossScale(scale=2.0**127, growth_interval=1)
    scale.update(False)
    assert scale.scale == _torchs([False], 2.0**127, 1)[0][0] == 2.0**127


def test_hysteresis_takes_several_overflows():
    scale = LossScale(scale=64.0, growth_interval=3, hysteresis=2, hysteresis_left=2)
    seen = []
    for skip in (True, True, True, False, False, False, True, True):
        scale.update(skip)
        seen.append(scale.scale)
    # used up by the first; restored by the growth on the third applied update
    assert seen == [64.0, 32.0, 16.0, 16.0, 16.0, 32.0, 32.0, 16.0]
    scale = LossScale(scale=64.0, hysteresis=2, hysteresis_left=2)
    for skip in (True, False, True):  # an applied update restores nothing
        scale.update(skip)
    assert scale.scale == 32.0
    scale = LossScale(scale=64.0, hysteresis=2, hysteresis_left=2, consecutive_hysteresis=True)
    for skip in (True, False, True, False, True):
        scale.update(skip)
    assert scale.scale == 64.0


def test_it_is_exhausted_at_its_minimum_only():
    scale = LossScale(scale=2.0, hysteresis=2, hysteresis_left=2)
    seen = []
    for _ in range(3):
        seen.append(scale.exhausted)
        scale.update(True)
    assert (seen, scale.exhausted, scale.scale) == ([False, False, True], True, 1.0)
    assert not LossScale(scale=1.0, hysteresis=2, hysteresis_left=2).exhausted
    static = LossScale(scale=1.0, dynamic=False)
    assert not static.exhausted
    static.scale = 16.0
    static.update(True)
    assert static.scale == 16.0


def test_its_state_is_a_grad_scalers_and_more():
    scale = LossScale(scale=512.0, growth_tracker=9, hysteresis=4, hysteresis_left=3)
    torchs = torch.amp.GradScaler('cpu')
    torchs.load_state_dict(scale.state_dict())
    assert torchs.state_dict().items() <= scale.state_dict().items()
    again = LossScale(hysteresis=4, hysteresis_left=4)
    again.load_state_dict(scale.state_dict())
    assert again == scale
    again.load_state_dict(torchs.state_dict())
    assert (again.scale, again.growth_tracker, again.hysteresis_left) == (512.0, 9, 4)


def test_settings_stay_those_of_the_run():
    scale = LossScale(scale=16.0, growth_interval=5, hysteresis=2, hysteresis_left=1, min_scale=8)
    scale.load_state_dict({'scale': 4.0, 'growth_interval': 99, '_growth_tracker': 1})
    assert (scale.scale, scale.growth_interval, scale.hysteresis_left) == (8.0, 5, 2)
    scale.load_state_dict({'scale': 1.0})  # of a run in fp32
    assert scale.scale == 8.0
    scale.load_state_dict({'scale': 512.0})  # a scale alone is one
    assert scale.scale == 512.0
    for saved, left in ((9, 2), (0, 1)):  # of another hysteresis
        scale.load_state_dict({'scale': 512.0, 'hysteresis_left': saved})
        assert scale.hysteresis_left == left
    static = LossScale(scale=16.0, dynamic=False)
    static.load_state_dict({'scale': 4.0, '_growth_tracker': 1})
    assert static.scale == 16.0


@pytest.mark.parametrize('state', [{'momentum': 1}, {'scale': 0.0}, {'scale': float('nan')}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(InternvlDsError, match='not the state of a loss scaler'):
        LossScale().load_state_dict(state)
