"""Epochs that accumulation does not divide, in a script's loop, and what zero_grad drops."""

import math

import pytest
import torch

from internvl_ds.engine.accumulation import Accumulation
from internvl_ds.errors import ConfigError
from tests.engine import accumulating
from tests.engine.accumulating import BATCHES, EPOCHS, GROUP, plain
from tests.harness.model import make_model, trained
from tests.harness.ranks import run_ranks

LAYOUTS = ['zero0', 'zero1', 'zero2', 'zero3']
OFFLOADED = trained(['zero1_offload', 'zero2_offload', 'zero3_offload'])
WHOSE = ['optimizer', 'client', 'engine', 'module', 'zeros']

# fp32: sums in another order. bf16: as in test_precision.py a gradient element is rounded (2**-8)
# at most eight times on one side and not the other, in as many micro-batches, half of them upwards.
ROUNDING = {'fp32': 1e-5, 'bf16': 8 * 2.0**-8}


def require_same(got, wanted, precision, where):
    """Norms and counts, and the weights' distance as a share of the way they have gone."""
    rounding = ROUNDING[precision]
    assert got['norms'] == pytest.approx(wanted['norms'], rel=rounding), where
    assert got.get('updates') == wanted.get('updates'), where
    start = {n: p.flatten().tolist() for n, p in make_model().named_parameters()}
    off = math.dist(
        *([v for n in wanted['weights'] for v in w['weights'][n]] for w in (got, wanted))
    )
    way = math.dist(
        *([v for n in wanted['weights'] for v in w[n]] for w in (wanted['weights'], start))
    )
    assert off <= rounding * way, (where, off / way)


@pytest.mark.ranks
def test_what_an_epoch_leaves_over_is_dropped_by_any_zero_grad(tmp_path):
    cells = [
        (layout, 'fp32', 'epoch', whose) for layout in LAYOUTS + OFFLOADED[1:] for whose in WHOSE
    ]
    cells += [(layout, 'bf16', 'epoch', 'optimizer') for layout in LAYOUTS + OFFLOADED[1:]]
    cells += [
        (layout, 'bf16', 'epoch', 'optimizer')
        for layout in ('zero2_fp32', 'zero3_fp32', 'zero2_offload_fp32')  # where they add up
    ]
    cells += [(layout, 'fp32', 'epoch', 'client') for layout in ('zero1_overlap', 'zero2_overlap')]
    cells += [
        (layout, 'fp32', where, 'optimizer')
        for layout in LAYOUTS + OFFLOADED
        for where in ('middle', 'every')
    ]
    results = run_ranks(accumulating.drop, 2, tmp_path, cells=cells)
    assert results[0] == results[1]
    for cell, got in zip(cells, results[0], strict=True):
        _, precision, where, _ = cell
        wanted = plain(precision, where)
        assert wanted['updates'] == EPOCHS * (BATCHES // GROUP)
        require_same(got, wanted, precision, cell)


@pytest.mark.first
@pytest.mark.ranks
def test_a_save_with_a_remainder_pending_changes_nothing_and_is_resumed(tmp_path):
    wanted = plain('fp32', 'epoch')
    for result in run_ranks(
        accumulating.save_in_the_middle, 2, tmp_path, root=str(tmp_path),
        layouts=LAYOUTS + OFFLOADED[1:],
    ):  # fmt: skip
        for layout, ways in result.items():
            for got in ways:
                require_same(got, wanted, 'fp32', layout)


@pytest.mark.ranks
def test_a_remainder_that_nobody_drops_is_an_error_that_says_how(tmp_path):
    for result in run_ranks(accumulating.carry, 2, tmp_path, layouts=LAYOUTS):
        for layout, (said, weights_stay, count_stays) in result.items():
            assert said.startswith('ConfigError: this update has 5 micro-batches'), layout
            assert 'optimizer.zero_grad() at the beginning of the next' in said, layout
            assert weights_stay, layout
            assert count_stays, layout


@pytest.mark.ranks
def test_a_wrong_setting_is_refused_at_the_first_update_whatever_zero_grad_does(tmp_path):
    for result in run_ranks(accumulating.wrong_setting, 2, tmp_path, layouts=LAYOUTS):
        for cell, (said, updates) in result.items():
            assert said.startswith('ConfigError: this update has 3 micro-batches'), cell
            assert f'(TRAIN.ACCUMULATION_STEPS) is {cell[-1]}' in said
            assert updates == 0, cell


def test_a_group_of_which_something_was_dropped_says_nothing_of_the_setting():
    accumulation, loss = Accumulation(), torch.zeros(())

    def group(count, dropped=0):
        for _ in range(dropped):
            accumulation.add(loss)
        if dropped:
            accumulation.drop()
        for _ in range(count - 1):
            accumulation.add(loss)
        accumulation.require_agreed(4, updates=1)
        accumulation.add(loss)
        return len(accumulation.finish(4))

    assert [group(4), group(2, dropped=2), group(1), group(4), group(3, dropped=1)] == [
        4,
        2,
        1,
        4,
        3,
    ]
    assert accumulation.micro_batches == 17
    assert [group(2), group(3, dropped=1)] == [2, 3]
    assert [group(2), group(4)] == [2, 4]  # the short one before was no sign of a setting
    with pytest.raises(ConfigError, match=r'has 5 micro-batches .* optimizer.zero_grad\(\)'):
        group(5, dropped=2)
