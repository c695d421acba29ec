"""Tags loaded into other world sizes, ZeRO stages and precisions, on real ranks."""

import pytest

from tests.ranks import run_ranks

SIZES, STAGES = (1, 2, 4), (0, 1, 2, 3)
UPDATES = 3

# Five updates on the same batches, whose gradients are summed over the ranks in another order: each
# differs by a few roundings (2**-24), which Adam's division by sqrt(v) may enlarge.
ROUNDING = 2e-5


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """(ranks, stage) -> what a run of that layout saved, and saw next."""
    root = tmp_path_factory.mktemp('layouts')
    found = {}
    for ranks in SIZES:
        result = run_ranks(
            'tests.workers.elastic:save_layouts', ranks, root, root=root, stages=STAGES
        )[0]
        found.update({(ranks, stage): result[str(stage)] for stage in STAGES})
    return found


def _sources(ranks):
    """All pairs of sizes and all pairs of stages, each size pair with every stage once."""
    index = SIZES.index(ranks)
    return [
        ((size, stage), STAGES[(stage + number + index) % 4])
        for number, size in enumerate(SIZES)
        for stage in STAGES
    ]


def test_every_pair_of_stages_and_of_sizes_is_loaded():
    pairs = [(source[1], stage) for ranks in SIZES for source, stage in _sources(ranks)]
    assert set(pairs) == {(a, b) for a in STAGES for b in STAGES}


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('ranks', SIZES)
def test_any_layout_goes_on_from_any_other(tmp_path, saved, ranks):
    sources = _sources(ranks)
    loads = [(saved[source]['path'], stage, {}) for source, stage in sources]
    results = run_ranks('tests.workers.elastic:load_layouts', ranks, tmp_path, loads=loads)
    for rank, result in enumerate(results):
        for (source, stage), got in zip(sources, result, strict=True):
            _same(got, saved[source], f'{source} -> {ranks} x {stage}, rank {rank}')


def _same(got, was, said):
    assert got['accuracy'] == 50.0, said
    assert got['epoch'] == UPDATES + 1, said
    assert got['counts'] == [UPDATES, 0], said
    assert got['state'] == was['state'], said
    assert all(state[-1] == UPDATES for state in got['state'].values()), said
    assert got['settings'] == was['settings'], said
    assert len({tuple(s) for s in got['settings'].values()}) == 4, said
    assert got['fixed'] == was['fixed'], said
    assert got['fixed']['tied'], said
    assert got['losses'] == pytest.approx(was['losses'], rel=ROUNDING), said
    assert got['losses'][0] != got['losses'][1], said
