"""A rank, or all, killed at a random moment of a save: what was committed is still there."""

import json
import os

import pytest

from tests.workers.forking import run_chain
from tests.workers.killing import TRIAL_LIMIT

# Another seed tries other moments, and more of them: set these two in the environment.
SEED = int(os.environ.get('INTERNVL_DS_KILL_SEED', '20261124'))
KILLS = int(os.environ.get('INTERNVL_DS_KILLS', '27'))


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.timeout(60 + 20 * KILLS)
@pytest.mark.parametrize('stage', [1, 3])
def test_a_killed_save_loses_nothing_that_was_committed(tmp_path, stage):
    trials = run_chain(
        'tests.workers.killing', tmp_path, 30 + 20 * KILLS,
        output=str(tmp_path / 'out'), stage=stage, seed=SEED + stage, kills=KILLS,
        folder=str(tmp_path / 'trials'),
    )  # fmt: skip
    assert sum(any(t['statuses']) for t in trials) >= KILLS, trials[-1]['logs']
    _check(trials)


def _check(trials):
    digests: dict[tuple[int, int], str] = {}  # (step, rank) -> of the state after that step
    may_be, best_may_be = {0}, {None}
    for number, trial in enumerate(trials):
        said = f'seed {SEED}, trial {number}: {json.dumps(trial)[:3000]}'
        assert trial['seconds'] < TRIAL_LIMIT, f'hung without a kill: {said}'
        steps = set()
        for rank, found in enumerate(trial['found']):
            assert found is not None, said
            steps.add(found['step'])
            assert found['step'] in may_be, said
            assert found['best'] in best_may_be, said
            for step, key in ((found['step'], 'digest'), (found['best'], 'best digest')):
                if step:
                    assert found[key] == digests[step, rank], said
        assert len(steps) == 1, said
        assert trial['found'][0]['hidden'] == [], said
        assert all(damage == [] for damage in trial['found'][0]['damage'].values()), said
        step = steps.pop()
        # The update is repeated from what was resumed: the same bits, or the resume was not exact.
        for rank, trained in enumerate(trial['trained']):
            assert trained['step'] == step + 1, said
            assert digests.setdefault((step + 1, rank), trained['digest']) == trained['digest'], (
                said
            )
        best = trial['found'][0]['best']
        # Once a save has been told of, it is there; in the background, once it was waited for.
        told = trial['committed' if trial['plan']['async'] else 'returned']
        may_be = {step + 1} if any(told) else {step, step + 1}
        best_may_be = {best}
        if trial['plan']['best']:
            best_may_be = {step + 1} if any(told) or any(trial['returned']) else {best, step + 1}
