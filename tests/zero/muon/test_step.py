"""timm's and torch's Muon at ZeRO stages 1 to 3: the numbers of plain PyTorch on whole batches."""

import math

import pytest
import torch

from tests.harness.model import make_model, trained
from tests.harness.ranks import run_ranks
from tests.zero.muon import orthogonalising
from tests.zero.muon.orthogonalising import plain

LAYOUTS = ['zero1', 'zero2', 'zero3', 'zero3_parts']
OFFLOADED = trained(['zero1_offload', 'zero2_offload', 'zero3_offload'])
TORCH = ['torch'] if hasattr(torch.optim, 'Muon') else []
# fp32: sums in another order. bf16: a gradient element is rounded (2**-8) at most eight times on
# one side and not the other; so are elements of the iterates where they are of bfloat16.
EXACT, ROUNDED = 1e-5, 8 * 2.0**-8


def require_same(got, wanted, rounding, cell):
    """Norms, and the weights' distance as a share of the way they have gone."""
    assert got['norms'] == pytest.approx(wanted['norms'], rel=rounding), cell
    assert got['weights'].keys() == wanted['weights'].keys(), cell
    start = {n: p.flatten().tolist() for n, p in make_model().named_parameters()}

    def distance(one, other):
        return math.dist(*([v for n in wanted['weights'] for v in w[n]] for w in (one, other)))

    off, way = distance(got['weights'], wanted['weights']), distance(wanted['weights'], start)
    assert off <= rounding * way, (cell, off / way)


@pytest.fixture
def untouched():
    """The plain loop runs here: what `exact` replaces is put back."""
    import timm.optim.muon

    function = timm.optim.muon.zeropower_via_newtonschulz
    defaults = function.__defaults__
    module = torch.optim._muon if TORCH else None
    of_torch = module and module._zeropower_via_newtonschulz
    yield
    function.__defaults__ = defaults
    if module:
        module._zeropower_via_newtonschulz = of_torch


@pytest.mark.first
@pytest.mark.ranks
def test_fp32_is_plain_pytorch_at_every_stage(tmp_path, untouched):
    cells = [(layout, 'one', 'fp32', clip, 1) for layout in LAYOUTS for clip in (None, 0.4)]
    cells += [(layout, 'many', 'fp32', 0.4, 2) for layout in LAYOUTS]
    cells += [(layout, kind, 'fp32', 0.4, 1) for layout in ['zero0', *LAYOUTS] for kind in TORCH]
    cells += [(layout, 'one', 'fp32', 0.4, 2) for layout in OFFLOADED]
    cells += [('zero0', 'one', 'fp32', 0.4, 1)]
    results = run_ranks(orthogonalising.follow, 2, tmp_path, cells=cells)
    assert results[0] == results[1]
    orthogonalising.exact()
    for cell, got in zip(cells, results[0], strict=True):
        layout, kind, *rest = cell
        require_same(got, plain(kind, *rest), EXACT, cell)
        fallback = 'head.weight' if kind == 'many' else ''
        for name, keys in got['keys'].items():
            if name not in got['weights']:
                continue  # frozen
            is_matrix = name.endswith('weight') and name not in ('norm.weight', fallback)
            assert ('momentum_buffer' in keys) is is_matrix, (cell, name, keys)
            assert ('exp_avg' in keys) is not is_matrix, (cell, name, keys)
        assert got['cut'] or layout[4] not in '12', cell


@pytest.mark.ranks
def test_with_iterates_and_gradients_in_bf16(tmp_path):
    cells = [(layout, 'defaults', 'fp32', 0.4, 1) for layout in LAYOUTS]
    for precision in ('bf16', 'autocast_bf16'):
        cells += [(layout, 'one', precision, 0.4, 2) for layout in ['zero1', 'zero2', 'zero3']]
    results = run_ranks(orthogonalising.follow, 2, tmp_path, cells=cells, rounded=True)
    assert results[0] == results[1]
    for cell, got in zip(cells, results[0], strict=True):
        require_same(got, plain(*cell[1:]), ROUNDED, cell)


@pytest.mark.ranks
def test_a_skipped_update_changes_nothing(tmp_path):
    for told in run_ranks(orthogonalising.skip, 2, tmp_path, layouts=['zero1', 'zero2', 'zero3']):
        assert all(all(found) for found in told.values()), told


@pytest.mark.ranks
def test_tags_go_on_in_each_stage_and_on_another_number_of_ranks(tmp_path):
    layouts = ['zero0', 'zero1', 'zero2', 'zero3']
    saved, _ = run_ranks(orthogonalising.save, 2, tmp_path, root=str(tmp_path), layouts=layouts)
    moved, others = run_ranks(orthogonalising.load, 2, tmp_path, saved=saved, layouts=layouts)
    (alone,) = run_ranks(orthogonalising.load, 1, tmp_path, saved=saved, layouts=['zero1', 'zero3'])
    for way, got in {**moved, **{f'{way} alone': got for way, got in alone.items()}}.items():
        source, target = way.split(' -> ')
        wanted = saved[source]
        assert got['said'] == '', way
        assert got['then'] == wanted['then'], way
        for name, weights in wanted['weights'].items():
            assert got['weights'][name] == pytest.approx(weights, rel=1e-4, abs=1e-6), way
        if '0' not in way and 'alone' not in way:
            assert got['ended'] == wanted['ended'], way
        if source == target:
            assert (got['digest'], got['later']) == (wanted['digest'], wanted['later']), way
    assert moved.keys() == others.keys()


@pytest.mark.ranks
def test_what_cannot_be_orthogonalised_is_refused_by_name(tmp_path):
    for told in run_ranks(orthogonalising.refusals, 2, tmp_path):
        assert "Muon at ZeRO stage 2: its algo 'adamuon' keeps squares" in told['adamuon']
        assert 'Muon at ZeRO stages 1 to 3: a parameter of shape (19,) is in a' in told['vector']
        assert 'a parameter group of Muon has matrices and other tensors' in told['mixed']
        assert told['fallback'] == 'no error'
