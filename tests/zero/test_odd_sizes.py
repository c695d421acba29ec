"""Groups of one element, buckets smaller than a parameter, engines without an optimizer."""

import math

import pytest
import torch

from tests.harness.ranks import run_ranks
from tests.zero import odd_sizes

# How far the way of all weights may be off that of stage 0: sums in another order, or rounded
# gradients (see tolerances() of test_grad_scaler.py).
NEAR = {'fp32': 1e-5, 'autocast_bf16': 2.0**-5}


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize('precision', NEAR)
def test_every_stage_trains_as_stage_0(tmp_path, precision):
    torch.manual_seed(0)
    start = {n: p.detach().flatten().tolist() for n, p in odd_sizes.Scaled().named_parameters()}
    for result in run_ranks(odd_sizes.train, 2, tmp_path, precision=precision):
        wanted = result.pop('0')
        way = distance(wanted, start, wanted)
        assert wanted['gain'] != start['gain']
        for stage, weights in result.items():
            assert distance(weights, wanted, wanted) <= NEAR[precision] * way, stage


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'autocast_bf16'])
def test_an_engine_without_an_optimizer_is_destroyed(tmp_path, precision):
    results = run_ranks(odd_sizes.destroy, 2, tmp_path, stages=[0, 3], precision=precision)
    assert results == ['no error'] * 2


def distance(a, b, names):
    return math.dist([v for n in names for v in a[n]], [v for n in names for v in b[n]])
