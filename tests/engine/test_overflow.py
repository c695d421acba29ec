"""Overflows without end: the error on all ranks, what it says, and the diagnostic save."""

import math

import pytest

from tests.harness.ranks import run_ranks


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
        'tests.workers.scaling:stop', 2, tmp_path, root=str(tmp_path / 'out'), stages=stages,
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


@pytest.mark.ranks
@pytest.mark.parametrize('stage', [0, 1, 2, 3])
def test_the_parameters_are_named_on_all_ranks(tmp_path, stage):
    for result in run_ranks(
        'tests.workers.scaling:poison_one', 2, tmp_path, stage=stage, bad_loss=False
    ):
        *names, message = result
        assert names == ['head.bias']
        assert 'Parameters with non-finite gradients: head.bias (1 in all)' in message
        assert 'The loss is finite on all ranks: look at the layers named' in message


@pytest.mark.ranks
def test_a_bad_loss_on_one_rank_is_told_on_all(tmp_path):
    for result in run_ranks(
        'tests.workers.scaling:poison_one', 2, tmp_path, stage=2, bad_loss=True
    ):
        assert 'The loss itself is not finite on some rank' in result[-1]
        assert 'stem.weight' in result
