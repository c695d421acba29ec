"""The bridge beside a bare engine loop, its accumulation, and what a checkpoint keeps of it."""

import re

import pytest

from tests.engine import scaling
from tests.harness.model import trained
from tests.harness.ranks import run_ranks

PRECISIONS = ['fp32', 'fp16', 'bf16', 'autocast_fp16', 'autocast_bf16']


@pytest.mark.ranks
@pytest.mark.parametrize('precision', PRECISIONS)
def test_the_bridge_adds_no_collective_and_reads_nothing(tmp_path, precision):
    results = run_ranks(scaling.count_work, 2, tmp_path, stages=[0, 1, 2, 3], precision=precision)
    for stage in range(4):
        for result in results:
            got = result[str(stage)]
            assert got['places'] == [], stage
            for who in ('bridge', 'bare'):  # not even for DeepSpeed's own rate
                assert got[who]['synchronisations'] == 0, (stage, who)
            if stage:
                assert got['bridge']['collectives'] == got['bare']['collectives'] > 0, stage
                assert got['bridge']['reads'] <= got['bare']['reads'], stage


@pytest.mark.first
@pytest.mark.ranks
def test_an_engine_is_not_scaled_by_what_another_one_left_on(tmp_path):
    """DeepSpeed's torch autocast is switched on for the process, and never off again."""
    for result in run_ranks(scaling.after_autocast, 2, tmp_path):
        assert result['after'] == result['before']
        assert result['scales'] == [None, None, None]


# calls of each update, what is agreed, updates until the error, and what it says
ACCUMULATIONS = [
    ([4, 4, 2, 4, 4, 1], 4, 6, None),  # the last of an epoch is short
    ([1, 1], 4, 0, 'has 1 micro-batches .* is 4'),
    ([4, 2, 2], 4, 2, 'has 2 micro-batches .* the one before it 2, .* is 4'),
    ([2], 1, 0, 'has 2 micro-batches .* is 1'),
    ([2, 3], 2, 1, 'has 3 micro-batches .* the one before it 2, .* is 2'),
]


@pytest.mark.ranks
def test_updates_that_disagree_with_the_accumulation_are_an_error(tmp_path):
    cases = [[groups, agreed] for groups, agreed, _, _ in ACCUMULATIONS]
    for result in run_ranks(scaling.accumulate, 2, tmp_path, stages=[0, 2], cases=cases):
        for of_stage in result:
            for (_, _, updates, message), got in zip(ACCUMULATIONS, of_stage, strict=True):
                assert len(got['norms']) == updates
                assert ('error' in got) == (message is not None)
                assert re.search(message or '', got.get('error', ''))


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp16', 'autocast_fp16'])
def test_the_scale_is_kept_across_save_and_load_into_every_stage(tmp_path, precision):
    results = run_ranks(scaling.keep_scale, 2, tmp_path, root=str(tmp_path), precision=precision)
    # hysteresis 3: overflows 1 and 2 use it up, 3 and 4 halve 1024 twice; then 3 applied updates
    wanted = {'scale': 256.0, '_growth_tracker': 3, 'hysteresis_left': 1, 'micro_batches': 1}
    for result in results:
        for stage in range(4):
            assert {k: result[str(stage)][k] for k in wanted} == wanted, stage
            for target in range(4):
                *tags, of_file = result[f'{stage} -> {target}']
                for state in tags:
                    got = {k: state[k] for k in wanted}
                    assert got == {**wanted, '_growth_tracker': 4}, (stage, target)
                # a .pth as the original writes it knows no hysteresis
                assert (of_file['scale'], of_file['_growth_tracker']) == (256.0, 4), (stage, target)


@pytest.mark.ranks
def test_a_grad_scalers_state_is_accepted(tmp_path):
    for precision, scale, tracker in (('autocast_fp16', 128.0, 8), ('fp32', 1.0, None)):
        for result in run_ranks(scaling.load_grad_scaler, 2, tmp_path, precision=precision):
            assert [r[:2] for r in result] == [[scale, tracker]] * 2
            assert all(0.01 < r[2] < 10 for r in result)


@pytest.mark.ranks
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_grad_norm_of_single_parameters_under_zero_settings(tmp_path, precision):
    settings = trained([
        {'stage': 0},
        {'stage': 1, 'round_robin_gradients': True},
        {'stage': 2, 'round_robin_gradients': True},
        {'stage': 1, 'offload_optimizer': {'device': 'cpu'}},
        {'stage': 2, 'offload_optimizer': {'device': 'cpu'}},
        {'stage': 2, 'contiguous_gradients': False, 'overlap_comm': True},
        {'stage': 3, 'sub_group_size': 100, 'offload_optimizer': {'device': 'cpu'}},
    ])  # fmt: skip
    tolerance = 1e-5 if precision == 'fp32' else 4 * 2.0**-8  # as in test_precision.py
    for plain, *others in run_ranks(
        scaling.norms_of_parts, 2, tmp_path, precision=precision, settings=settings
    ):
        assert plain['after'] == 'no error'
        for zero, got in zip(settings[1:], others, strict=True):
            assert got['norms'] == pytest.approx(plain['norms'], rel=tolerance), zero
            assert 'between backward and step' in got['after'], zero
