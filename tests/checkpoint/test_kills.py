"""A rank, or all, killed at a random moment of a save: what was committed is still there.

`tests.bench.kills` says what is checked after each kill, and makes more of them:
``python -m tests.bench.kills --count 300 --seed 7``.
"""

import os
import re
import sys

import pytest

from tests.harness.counts import trials
from tests.harness.ranks import run_command

# Another seed tries other moments, and more of them: set these two in the environment.
SEED = os.environ.get('INTERNVL_DS_KILL_SEED', '20261124')
KILLS = trials('INTERNVL_DS_KILLS', 12, soak=300)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(240 + 20 * KILLS)
def test_a_killed_save_loses_nothing_that_was_committed(tmp_path):
    command = [sys.executable, '-m', 'tests.bench.kills', '--count', str(KILLS), '--seed', SEED]
    job = run_command([*command, '--out', str(tmp_path)], timeout=200 + 20 * KILLS)
    assert job.returncode == 0, job.output[-20000:]
    total, inside = re.search(r'(\d+) kills, (\d+) inside a save', job.output).groups()
    assert int(total) == KILLS
    assert int(inside) >= KILLS // 2, job.output[-3000:]
    # | program | ZeRO | kills | inside | async | step | best | rank 0, 1, both | ...
    rows = [line.split('|')[1:-1] for line in job.output.splitlines() if re.search(r'\| \d', line)]
    assert [(row[0].strip(), int(row[1])) for row in rows] == [
        ('script', 1), ('script', 3), ('program', 1), ('program', 3),
    ]  # fmt: skip
    for column in range(4, 7):
        assert 0 < sum(int(row[column]) for row in rows) < KILLS
    victims = [list(map(int, row[7].split(','))) for row in rows]
    assert min(sum(column) for column in zip(*victims, strict=True)) > 0
