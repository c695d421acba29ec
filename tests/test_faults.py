"""Whatever happens to a job under any launcher, it ends in time, fails, says why, and is gone."""

import re

import pytest

from tests import hosts
from tests.bench.faults import FAULTS, LAUNCHERS, ON_TWO_HOSTS, WORST, measure_all

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

# What names the place and the reason; where a launcher ends the ranks at once, its own words.
NAMED = {
    'killed': r'rank 1 on \S+ \(pid \d+\) has given|process rank 1 .* on node|PID \d+ RUNNING AT',
    'crashed': r'rank 1 on \S+ ends the job: ValueError: a bad batch',
    'stopped': r'rank 0 on \S+ ends the job: rank 1 on \S+ \(pid \d+\) has given no sign of life',
    'cut': r'rank [23] on host1 \(pid \d+\)|lost communication with a remote daemon',
    'unreachable': r'rank \d of 4 on host\d could not join the others at 10\.99\.0\.77:\d+ within',
    'hostfile': r'Could not resolve hostname nowhere',
}


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    return {(c.launcher, c.fault): c for c in measure_all(tmp_path_factory.mktemp('faults'))}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_a_fault_ends_the_job(cells, launcher, fault):
    if (launcher, fault) == ('deepspeed', 'unreachable'):
        return  # there is no such case: it decides by itself where rank 0 is
    if fault in ON_TWO_HOSTS and hosts.why_not() is not None:
        pytest.skip(f'cannot make hosts: {hosts.why_not()}')
    cell = cells[launcher, fault]
    assert cell.seconds < WORST, cell
    assert cell.status not in (0, None), cell
    assert re.search(NAMED[fault], cell.output), cell
    assert cell.left == 0, cell
