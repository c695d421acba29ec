"""Gradients that ZeRO keeps: of parameters without a part in an update, and of several forwards."""

import pytest

from tests.engine import accumulating
from tests.engine.accumulating import DROP, plain_branches, plain_forwards_first
from tests.harness.model import trained
from tests.harness.ranks import run_ranks

LAYOUTS = trained(
    ['zero0', 'zero1', 'zero2', 'zero3', 'zero1_offload', 'zero2_offload', 'zero3_offload']
)
# Reduced while the backward still runs: a bucket at a time, copied together or not.
OVERLAPPED = ['zero1_overlap', 'zero1_overlap_fp32', 'zero1_overlap_copied', 'zero2_overlap',
              'zero2_overlap_copied', 'zero1_overlap_offload', 'zero2_overlap_offload',
              'zero3_overlap']  # fmt: skip

# One entry an update, one number a micro-batch: whether it takes the branch.
PLANS = [
    [[1], [0], [1]],
    [[1, 1], [0, 1], [0, 0]],
    [[1, 1], [1, 0], [0, 0]],
    [[1, 1, 1], [0, 1, 0], [0, 0, 1]],
    [[1, 1], [1, DROP, 0], [0, 1]],
]


def near(result):
    """SGD in fp32 over a few updates: sums in another order."""
    weights = {n: pytest.approx(w, rel=1e-5, abs=1e-6) for n, w in result['weights'].items()}
    return {'norms': pytest.approx(result['norms'], rel=1e-5), 'weights': weights}


@pytest.mark.first
@pytest.mark.ranks
def test_a_parameter_without_a_part_in_an_update_stays(tmp_path):
    layouts = LAYOUTS + trained(OVERLAPPED)
    for result in run_ranks(accumulating.branches, 2, tmp_path, layouts=layouts, plans=PLANS):
        for plan in PLANS:
            wanted = near(plain_branches(plan))
            for layout in layouts:
                assert result[f'{layout} {plan}'] == wanted, (layout, plan)


@pytest.mark.ranks
def test_losses_whose_forwards_came_first_or_were_the_modules_add_up(tmp_path):
    wanted = near(plain_forwards_first())
    for result in run_ranks(accumulating.forwards_first, 2, tmp_path, layouts=LAYOUTS):
        for cell, got in result.items():
            assert got == wanted, cell
