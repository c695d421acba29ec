"""timm's and torch's Muon at ZeRO stages 1 to 3: the numbers of plain PyTorch on whole batches."""

import gc
import math
import weakref

import pytest
import timm.optim
import torch
from torch import nn

from internvl_ds.errors import ConfigError
from internvl_ds.zero.muon.step import MuonParts
from internvl_ds.zero.partition import Slices
from internvl_ds.zero.wrapper import only_groups
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


SHAPES = [{'a': (6, 5), 'b': (4, 2, 3, 3)}, {'bias': (5,)}]


def alone(optimizer_of, shapes=SHAPES, **settings):
    """Weights after three updates of whole tensors, and of flat ones of one rank, with their state.

    A group for each mapping of ``shapes``.
    """
    torch.manual_seed(0)
    tensors = [[nn.Parameter(torch.randn(s)) for s in names.values()] for names in shapes]
    flats = [nn.Parameter(torch.cat([p.detach().flatten() for p in group])) for group in tensors]
    whole = optimizer_of([{'params': group, **settings} for group in tensors])
    client = optimizer_of([{'params': [nn.Parameter(torch.ones(4, 4))], **settings} for _ in flats])
    for group, flat in zip(client.param_groups, flats, strict=True):
        group['params'] = [flat]
    slots = [(g, flat) for g, flat in zip(client.param_groups, flats, strict=True)]
    parts = MuonParts(client, slots, Slices(shapes, 1), 0, torch.device('cpu'))
    for _ in range(3):
        for group, flat in zip(tensors, flats, strict=True):
            for p in group:
                p.grad = torch.randn_like(p)
            flat.grad = torch.cat([p.grad.flatten() for p in group])
        whole.step()
        with only_groups(client, parts.step(client, client.param_groups)):
            client.step()
    wanted = [torch.cat([p.detach().flatten() for p in group]) for group in tensors]
    got = [flat.detach() for flat in flats]
    kept = [[whole.state[p] for p in group] for group in tensors]
    return wanted, got, kept, [client.state[flat] for flat in flats]


@pytest.mark.parametrize(
    ('lr', 'more'),
    [
        (0.02, {}), (0.02, {'nesterov': True, 'weight_decay': 0.3}), (torch.tensor(0.02), {}),
        (0.02, {'conv_mode': 'batched', 'normalize_spatial': True, 'adjust_lr_fn': 'rms_to_rms'}),
        (0.02, {'scale_eps': True, 'eps': 1e-2, 'fallback_lr_scale': 3.0}),
    ],
)  # fmt: skip
def test_whole_tensors_and_flat_ones_go_the_same_way(lr, more):
    wanted, got, kept, flat_kept = alone(lambda groups: timm.optim.Muon(groups, lr=lr, **more))
    for one, other in zip(wanted, got, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)
    for of_whole, of_flat in zip(kept, flat_kept, strict=True):
        assert of_flat.keys() == of_whole[0].keys()
        for key in of_flat.keys() - {'step'}:
            values = [torch.as_tensor(state[key]) for state in of_whole]
            same = torch.cat([v.flatten() for v in values]) if values[0].dim() else values[0]
            assert torch.equal(torch.as_tensor(of_flat[key]), same), key


@pytest.mark.skipif(not TORCH, reason='a torch without Muon')
def test_so_do_those_of_torch_s():
    shapes = [{'a': (6, 5), 'b': (4, 9)}]
    wanted, got, kept, flat_kept = alone(lambda g: torch.optim.Muon(g, lr=0.02), shapes)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-6)
    assert flat_kept[0].keys() == kept[0][0].keys()


def test_one_flat_tensor_of_both_kinds_is_refused():
    with pytest.raises(ConfigError, match='has matrices and other tensors, of which ZeRO has'):
        alone(lambda groups: timm.optim.Muon(groups, lr=0.1), [{'a': (6, 5), 'b': (5,)}])
    with pytest.raises(ConfigError, match='of shape .5,. is in a group with use_muon True'):
        alone(lambda groups: timm.optim.Muon(groups, lr=0.1), [{'b': (5,)}], use_muon=True)


def test_the_optimizer_of_an_engine_that_is_gone_is_freed():
    flat = nn.Parameter(torch.randn(30))
    client = timm.optim.Muon([{'params': [flat], 'use_muon': True}], lr=0.1)
    layout = Slices([{'a': (6, 5)}], 1)
    parts = MuonParts(client, [(client.param_groups[0], flat)], layout, 0, torch.device('cpu'))
    flat.grad = torch.randn(30)
    assert parts.step(client, client.param_groups) == []
    gone = weakref.ref(client)
    del client
    gc.collect()
    assert gone() is None


@pytest.fixture
def untouched():
    """The plain loop runs here: what `exact` replaces is put back."""
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
    cells = [(layout, 'one', 'fp32', 0.2, 1) for layout in ['zero0', *LAYOUTS]]
    cells += [(layout, 'one', 'fp32', None, 1) for layout in ('zero2', 'zero3')]
    cells += [(layout, 'many', 'fp32', 0.2, 2) for layout in LAYOUTS]
    cells += [(layout, kind, 'fp32', 0.2, 1) for layout in LAYOUTS[:3] for kind in TORCH]
    cells += [(layout, 'one', 'fp32', 0.2, 2) for layout in OFFLOADED]
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
    cells = [(layout, 'defaults', 'fp32', 0.2, 1) for layout in LAYOUTS]
    for precision in ('bf16', 'autocast_bf16'):
        cells += [(layout, 'one', precision, 0.2, 2) for layout in ['zero1', 'zero2', 'zero3']]
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
    layouts = ['zero0', 'zero1', 'zero2', 'zero3', 'zero0_mixed', 'zero2_mixed']
    saved, _ = run_ranks(orthogonalising.save, 2, tmp_path, root=str(tmp_path), layouts=layouts)
    to = [(layout, layout) for layout in layouts] + [('zero1', 'zero3'), ('zero1', 'zero0')]
    to += [('zero3', 'zero1'), ('zero0', 'zero1'), ('zero0', 'zero3'), ('zero3', 'zero2')]
    to += [('zero2_mixed', 'zero0_mixed'), ('zero0_mixed', 'zero3_mixed')]
    moved, others = run_ranks(orthogonalising.load, 2, tmp_path, saved=saved, moves=to)
    to = [('zero3', 'zero1'), ('zero1', 'zero3')]
    (alone,) = run_ranks(orthogonalising.load, 1, tmp_path, saved=saved, moves=to)
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
def test_an_export_has_the_script_s_groups_and_goes_on_in_plain_pytorch(tmp_path):
    for told in run_ranks(orthogonalising.files, 2, tmp_path, root=str(tmp_path)):
        assert told['said'] == ''
        assert told['groups'] == [[]]  # one, in which the class decides by shape
        for name, weights in told['engine'].items():
            for way in ('file', 'plain'):
                assert told[way][name] == pytest.approx(weights, rel=1e-4, abs=1e-6), (way, name)


@pytest.mark.ranks
def test_what_cannot_be_orthogonalised_is_refused_by_name(tmp_path):
    for told in run_ranks(orthogonalising.refusals, 2, tmp_path):
        assert "Muon at ZeRO stage 2: its algo 'adamuon' keeps squares" in told['adamuon']
        assert 'Muon at ZeRO stages 1 to 3: a parameter of shape (19,) is in a' in told['vector']
        assert 'a parameter group of Muon has matrices and other tensors' in told['mixed']
        assert told['fallback'] == 'no error'
