"""A schedule of micro-batches over real engines: each step, across resumes, stepped twice."""

import pytest

from tests.engine import scheduling
from tests.engine.scheduling import BATCHES, GROUP, SKIPPED, plain_lrs
from tests.harness.ranks import run_ranks

STAGES = [0, 1, 2, 3]


@pytest.mark.first
@pytest.mark.ranks
def test_the_lr_is_that_of_a_plain_loop_which_counts_micro_batches(tmp_path):
    cells = [(stage, 'timm', short) for stage in STAGES for short in (True, False)]
    cells += [(0, 'torch', False), (3, 'torch', True)]
    for result in run_ranks(scheduling.follow, 2, tmp_path, cells=cells):
        for (stage, kind, short), got in zip(cells, result, strict=True):
            wanted = plain_lrs(kind, short)
            assert wanted[SKIPPED - 1] == wanted[SKIPPED - 2]  # a skipped update moves nothing
            assert len(set(wanted)) == len(wanted) - 1
            assert got == wanted, (stage, kind, short)


@pytest.mark.ranks
def test_a_resumed_schedule_goes_on_where_it_was(tmp_path):
    wanted = {kind: plain_lrs(kind, short=False) for kind in ('timm', 'torch')}
    tags = {
        (stage, kind, unit): run_ranks(
            scheduling.save, 2, tmp_path, root=str(tmp_path / str(unit)),
            stage=stage, kind=kind, schedule_in=unit,
        )[0]
        for stage, kind, unit in (
            (1, 'timm', 'micro-batches'), (2, 'torch', 'micro-batches'), (2, 'timm', 'updates')
        )
    }  # fmt: skip
    tag, of_torch = tags[1, 'timm', 'micro-batches'], tags[2, 'torch', 'micro-batches']
    of_updates = tags[2, 'timm', 'updates']
    base = {'kind': 'timm', 'schedule_in': 'micro-batches', 'group': GROUP, 'restored': True}
    same = [
        {**base, 'tag': tag, 'stage': 1},
        {**base, 'tag': tag, 'stage': 3},  # by name
        {**base, 'tag': tag, 'stage': 0, 'schedule_in': None},  # it counts what it counted
        {**base, 'tag': f'{tag}.pth', 'stage': 2},
        {**base, 'tag': of_torch, 'stage': 2, 'kind': 'torch'},
        {**base, 'tag': of_torch, 'stage': 1, 'kind': 'torch'},
        # on one rank an update has twice as many micro-batches of the same size
        {**base, 'tag': tag, 'stage': 1, 'group': 2 * GROUP},
        {**base, 'tag': of_torch, 'stage': 1, 'group': 2 * GROUP, 'kind': 'torch'},
        # this run's own schedule, which is of twice as many
        {**base, 'tag': tag, 'stage': 0, 'group': 2 * GROUP, 'restored': False},
    ]
    for ranks, cells in ((2, same[:6]), (1, same[6:])):
        for result in run_ranks(scheduling.resume, ranks, tmp_path, cells=cells):
            for cell, got in zip(cells, result, strict=True):
                lrs = wanted[cell['kind']]
                third = len(lrs) // 3
                assert got['lrs'] == pytest.approx(lrs[-third:], rel=1e-12), cell
                assert got['before'] == pytest.approx(lrs[-third - 1], rel=1e-12), cell
    cells = [{**base, 'tag': of_updates, 'stage': stage} for stage in (2, 3)]
    got = run_ranks(scheduling.resume, 2, tmp_path, cells=cells)[0]
    for result in got:  # still by updates, and it says so
        assert result['lrs'] == got[0]['lrs'] != wanted['timm'][-len(result['lrs']) :]
        assert (
            'the lr schedule counts updates, as when it was saved, and not micro-batches'
            in (result['warned'])
        )


@pytest.mark.ranks
def test_a_loop_that_steps_the_engines_schedule_too_is_an_error(tmp_path):
    for result in run_ranks(scheduling.step_too, 2, tmp_path, stages=STAGES):
        for cell, (said, trained, again, stays, updates) in result.items():
            assert said.startswith('ConfigError: the learning rates are ['), cell
            assert 'Remove lr_scheduler.step_update(...) or .step() from the loop' in said, cell
            assert "pass schedule_in='micro-batches'" in said, cell
            assert (trained, again, stays, updates) == (True, True, True, 1), cell


@pytest.mark.ranks
def test_a_schedule_of_which_nobody_says_what_it_counts(tmp_path):
    got, other = run_ranks(scheduling.warn, 2, tmp_path, root=str(tmp_path))
    start, end = got['unclear']
    assert 'it would run TRAIN.ACCUMULATION_STEPS=4 times too slowly' in start
    assert "pass schedule_in='micro-batches'; schedule_in='updates' says" in start
    assert f't_initial {3 * BATCHES} over 3 epochs is {BATCHES} an epoch' in end
    assert 'an epoch has 2 updates' in end
    assert got['of updates'] == [start]
    assert got['told'] == got['micro-batches'] == got['no accumulation'] == []
    assert other['unclear'] == [end]


@pytest.mark.ranks
def test_a_schedule_that_the_script_steps_keeps_its_lr_in_another_layout(tmp_path):
    for result in run_ranks(scheduling.own_schedule, 2, tmp_path, root=tmp_path):
        assert result == [result[0]] * 3
