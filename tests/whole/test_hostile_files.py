"""Damaged, special and hostile files of every kind: each is refused by name, or harms nothing.

More of them: ``python -m tests.harness.hostile --cases 20000``.
"""

import json
import random

import pytest

from tests.harness.counts import trials
from tests.harness.ranks import run_ranks
from tests.whole import fuzzing

CASES = trials('INTERNVL_DS_FILES', 820, soak=10_000)  # at each of two stages


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(200 + CASES)
@pytest.mark.parametrize('stage', [1, 3])
def test_no_file_hangs_a_reader_fills_memory_runs_code_or_changes_what_refuses_it(tmp_path, stage):
    seed = random.randrange(1 << 32)
    print(f'python -m tests.harness.hostile --stage {stage} --cases {CASES} --seed {seed}')
    (result,) = run_ranks(
        fuzzing.fuzz, 1, tmp_path, timeout=100 + CASES,
        root=tmp_path, stage=stage, cases=CASES, seed=seed,
    )  # fmt: skip
    assert not result['failures'], json.dumps(result, indent=1)
    assert len(result['kinds']) >= 27
    assert min(result['kinds'].values()) >= 28
