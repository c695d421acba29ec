"""The averages, sharded and timm's, on 2 real ranks."""

import pytest

from tests.ranks import run_ranks
from tests.workers.model import OFFLOAD, PERSISTENT

STAGES = [0, 1, 2, 3, OFFLOAD, PERSISTENT]


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_ema_is_the_average_and_evaluates_in_place(tmp_path, precision):
    results = run_ranks(
        'tests.workers.saving:ema_in_place', 2, tmp_path, stages=STAGES, precision=precision
    )
    for stage in map(str, STAGES):
        for result in results:
            got = result[stage]
            # the same fp32 lerp, element by element, over another cut of the tensors
            assert got['off'] <= 1e-7, stage
            assert got['inside_differs'], stage
            assert got['restored'], stage
            assert got['inside'] == results[0][stage]['inside']
            # `seen` counts forward passes in training: 2 an update, averaged with decay 0.9
            assert got['seen'] == pytest.approx(_averaged_count(5), rel=1e-6)


def _averaged_count(updates: int) -> float:
    average = 0.0
    for update in range(1, updates + 1):
        average += 0.1 * (2 * update - average)
    return average


@pytest.mark.ranks
def test_timm_averages_are_saved_and_loaded(tmp_path):
    for result in run_ranks('tests.workers.saving:timm_ema', 2, tmp_path, root=tmp_path):
        assert result['ModelEma'] == [True, 0.75]
        assert result['ModelEmaV2'] == [True, 0.75]
        assert result['ModelEmaV3'] == [True, 0.75]
        assert result['from shards'] <= 1e-7  # the same fp32 numbers, merged from 2 ranks
        assert result['without'] == [0.0, 'has no EMA: starting from the loaded weights']
