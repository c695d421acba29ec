"""Overflows without end: the error on all ranks, what it says, and the diagnostic save."""

import math

import pytest
import torch

from internvl_ds.engine.overflow import KEPT, OverflowWatch
from internvl_ds.zero.loss_scale import LossScale
from tests.engine import scaling
from tests.harness.ranks import run_ranks


def record(watch, *skips, scale=1.0):
    for skipped in skips:
        watch.record([torch.tensor(0.25)] * 2, torch.tensor(math.inf), scale, skipped)


@pytest.mark.parametrize('limit', [1, 3])
def test_the_last_of_so_many_skipped_updates_in_a_row_would_stop(limit):
    watch = OverflowWatch()
    record(watch, *[True] * 5, False)  # an applied one begins anew
    for _ in range(limit - 1):
        assert not watch.would_stop(None, limit)
        record(watch, True)
    assert watch.would_stop(None, limit)
    assert not watch.would_stop(None, 0)  # no limit
    assert not watch.would_stop(None, limit + 1)


def test_a_scale_at_its_minimum_would_stop_at_once():
    assert OverflowWatch().would_stop(LossScale(scale=1.0), 0)
    assert not OverflowWatch().would_stop(LossScale(scale=2.0), 0)


@pytest.mark.parametrize(
    ('scale', 'bad_loss', 'why', 'advice'),
    [
        (LossScale(scale=1.0), False, 'the loss scale is at its minimum, 1 ', 'float16 (65504)'),
        (LossScale(scale=8.0), False, '2 updates in a row were skipped', 'float16 (65504)'),
        (LossScale(scale=8.0, dynamic=False), False, '2 updates in a row', 'loss scale 8 is too'),
        (None, False, '2 updates in a row', 'look at the layers named for a division'),
        (None, True, '2 updates in a row', 'The loss itself is not finite on some rank'),
    ],
)
def test_what_the_error_says(scale, bad_loss, why, advice):
    watch = OverflowWatch()
    record(watch, *[False] * KEPT, True, True, scale=1.0 if scale is None else scale.scale)
    error = watch.error(scale, 9, 1, ['head.bias'], bad_loss)
    text = str(error)
    assert text.startswith('update 9: the gradients are not finite, and ')
    assert why in text
    assert advice in text
    assert 'Last losses of rank 1: 0.5, 0.5, 0.5, 0.5, 0.5; gradient norms: inf' in text
    assert 'Parameters with non-finite gradients: head.bias (1 in all)' in text


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp16', 'autocast_fp16'])
def test_a_scale_at_its_minimum_stops_all_ranks(tmp_path, precision):
    fp16 = {'initial_scale_power': 2, 'min_loss_scale': 1}
    for result in _stop(tmp_path, [0, 1, 2, 3], precision, fp16, limit=25):
        assert result['scales'] == [4.0, 4.0, 2.0, 1.0]  # one applied, then 4 -> 2 -> 1 -> stop
        assert 'the loss scale is at its minimum, 1 ' in result['message']
        assert 'AMP_TYPE bfloat16' in result['message']
        _require_common(result, updates=4)


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_too_many_in_a_row_stop_all_ranks(tmp_path, precision):
    for result in _stop(tmp_path, [0, 2, 3], precision, {}, limit=3):
        assert result['scales'] == [1.0] * 4
        assert '3 updates in a row were skipped (TRAIN.MAX_CONSECUTIVE' in result['message']
        _require_common(result, updates=4)


@pytest.mark.ranks
def test_a_static_scale_that_is_too_large_is_named(tmp_path):
    for result in _stop(tmp_path, [1], 'fp16', {'loss_scale': 32}, limit=2):
        assert result['scales'] == [32.0] * 3
        assert 'The static loss scale 32 is too large: lower /fp16/loss_scale' in result['message']


def _stop(tmp_path, stages, precision, fp16, limit):
    results = run_ranks(
        scaling.stop, 2, tmp_path, root=str(tmp_path / 'out'), stages=stages,
        precision=precision, fp16=fp16, limit=limit,
    )  # fmt: skip
    return [of_stage for result in results for of_stage in result]


def _require_common(result, updates):
    norms = [float(x) for x in result['norms']]
    assert math.isfinite(norms[0])
    assert not any(map(math.isfinite, norms[1:]))
    assert all(math.isfinite(float(x)) for x in result['losses'])  # the loss was, its gradient not
    assert result['parameters'][0] == 'stem.weight'
    assert result['updates'] == updates
    assert 'stem.weight' in result['message']
    assert 'Last losses of rank' in result['message']
    assert result['unchanged']
    assert result['latest']  # the diagnostic tag is not what latest names
    assert result['diagnostic_epoch'] == 3


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_the_parameters_are_named_on_all_ranks(tmp_path, precision):
    """What one rank alone owns is not finite, and all skip the update."""
    stages = [0, 1, 2, 3]
    for result in run_ranks(
        scaling.poison, 2, tmp_path, stages=stages, precision=precision, bad_loss=False
    ):
        for *names, message in result:
            assert names == ['head.bias']
            assert 'Parameters with non-finite gradients: head.bias (1 in all)' in message
            advice = 'range of float16' if precision == 'fp16' else 'look at the layers named'
            assert advice in message


@pytest.mark.ranks
def test_a_bad_loss_on_one_rank_is_told_on_all(tmp_path):
    for (result,) in run_ranks(
        scaling.poison, 2, tmp_path, stages=[2], precision='fp32', bad_loss=True
    ):
        assert 'The loss itself is not finite on some rank' in result[-1]
        assert 'stem.weight' in result
