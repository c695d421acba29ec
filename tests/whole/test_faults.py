"""Whatever happens to a job under any launcher, it ends in time, fails, says why, and is gone."""

import re

import pytest

from tests.bench import places
from tests.bench.faults import (
    AT_PLACES,
    CELLS,
    QUICK,
    QUICK_CELLS,
    WORST,
    measure_all,
    table,
    why_not,
)
from tests.harness import hosts
from tests.harness.counts import SOAK
from tests.harness.ranks import ROOT

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.soak]

PLACES = AT_PLACES if SOAK else QUICK
# A Slurm of its own for each cell does not always start its job beside others: see test_slurm.py.
ALONE = [cell for cell in (CELLS if SOAK else QUICK_CELLS) if cell[1] != 'Slurm']

# What names the place and the reason; where a launcher ends the ranks at once, its own words.
NAMED = {
    'killed': r'rank 1 on \S+ \(pid \d+\) (has given|is dead)|process rank 1 .* on node|'
    r'PID \d+ RUNNING AT|'
    r'localhost: task 1: Killed',
    'crashed': r'rank 1 on \S+ ends the job: ValueError: a bad batch',
    'stopped': r'rank 0 on \S+ ends the job: rank 1 on \S+ \(pid \d+\) has given no sign of life',
    'cut': r'rank [23] on host1 \(pid \d+\)|lost communication with a remote daemon',
    'unreachable': r'rank \d of 4 on host\d could not join the others at 10\.99\.0\.77:\d+ within',
    'hostfile': r'no address is known here for host nowhere|nowhere: ssh: Could not resolve',
}


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    folder = tmp_path_factory.mktemp('faults')
    measured = measure_all(folder, ALONE, PLACES)
    (folder / 'table.md').write_text(table(measured))
    return {(cell.launcher, cell.fault): cell for cell in measured}


@pytest.mark.timeout(7200 if SOAK else 1200)
@pytest.mark.parametrize(('fault', 'launcher'), [*ALONE, *PLACES])
def test_a_fault_ends_the_job(cells, fault, launcher):
    if reason := why_not(fault, launcher):
        pytest.skip(f'cannot be tried here: {reason}')
    cell = cells[launcher, fault]
    assert cell.seconds < WORST, cell
    assert cell.status not in (0, None), cell
    assert re.search(NAMED[fault.partition(' at ')[0]], cell.output), cell
    # MPICH's daemon on a host that is cut off, and ssh to it, stay until TCP gives up.
    daemons = ['hydra_pmi_proxy', 'ssh'] if (fault, launcher) == ('cut', 'MPICH') else []
    assert set(cell.left) <= set(daemons), cell


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('places')
    return folder, *places.prepare(folder)


def test_every_meeting_of_the_package_is_a_place(prepared):
    _, _, found = prepared
    known = {place.what.partition(',')[0] for own in found for place in own}
    meeting = r"\b(?:exchange|gather|agree|from_rank_0)\(\s*'([^']+)'"
    package = ROOT / 'internvl_ds'
    # A rank that does not come to the self-test's is tried in test_selftest.py.
    files = [path for path in package.rglob('*.py') if 'selftest' not in path.parts]
    sources = [path.read_text() for path in files]
    named = {name for text in sources for name in re.findall(meeting, text)}
    assert len(named) > 30, named
    assert named <= known, named - known


@pytest.mark.timeout(14400 if SOAK else 600)
def test_a_rank_that_is_gone_at_any_place_is_named_in_time(prepared):
    folder, shared, found = prepared
    trials = places.trials_of(found)
    trials = trials if SOAK else places.chosen(trials)
    assert {trial.place.what for trial in trials} >= set(places.CHOSEN)
    if hosts.why_not():
        trials = [trial for trial in trials if trial.fault != places.CUT]
    ended = places.measure_all(folder, shared, trials)
    wrong = [cell for cell in ended if not cell.is_right(slack=5.0)]  # other tests run beside these
    assert not wrong, places.table(wrong)
