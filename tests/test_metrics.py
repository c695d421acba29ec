"""MyAverageMeter: what it shows, what it counts, and what it forgets."""

import math

import pytest
import torch

from internvl_ds.metrics import MyAverageMeter


def filled(values, max_len=-1):
    meter = MyAverageMeter(max_len)
    for value in values:
        meter.update(value)
    return meter


def test_before_any_value_everything_is_zero():
    meter = MyAverageMeter()
    assert (meter.val, meter.avg, meter.var) == (0.0, 0.0, 0.0)


def test_var_is_the_population_standard_deviation():
    meter = filled([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert meter.val == 9.0
    assert meter.avg == pytest.approx(5.0)
    assert meter.var == pytest.approx(2.0)  # the sample deviation would be 2.138


def test_the_window_keeps_the_last_values_only():
    meter = filled([100.0, 100.0, 1.0, 3.0], max_len=2)
    assert (meter.avg, meter.var) == (2.0, 1.0)


@pytest.mark.parametrize('max_len', [0, -1, -5])
def test_without_a_length_every_value_counts(max_len):
    assert filled(range(1001), max_len).avg == pytest.approx(500.0)


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_is_shown_and_not_counted(bad):
    meter = filled([1.0, 3.0, bad])
    assert meter.val == bad or (math.isnan(bad) and math.isnan(meter.val))
    assert (meter.avg, meter.var) == (2.0, 1.0)


def test_non_finite_values_push_nothing_out_of_the_window():
    meter = filled([1.0, 3.0, math.nan, math.inf, math.nan], max_len=2)
    assert (meter.avg, meter.var) == (2.0, 1.0)


def test_only_non_finite_values_leave_the_statistics_at_zero():
    meter = filled([math.nan, math.inf])
    assert meter.val == math.inf
    assert (meter.avg, meter.var) == (0.0, 0.0)


def test_it_recovers_after_non_finite_values():
    meter = filled([math.nan, 4.0])
    assert (meter.val, meter.avg, meter.var) == (4.0, 4.0, 0.0)


def test_tensors_are_taken_and_plain_floats_come_out():
    meter = filled([torch.tensor(1.5), torch.tensor(2.5, dtype=torch.bfloat16)])
    assert [type(x) for x in (meter.val, meter.avg, meter.var)] == [float, float, float]
    assert meter.avg == pytest.approx(2.0)


def test_a_loaded_meter_keeps_its_own_length():
    meter = MyAverageMeter(2)
    meter.load_state_dict({'val': 1.0, 'window': [9.0, 1.0]})
    meter.update(3.0)
    assert (meter.val, meter.avg) == (3.0, 2.0)
