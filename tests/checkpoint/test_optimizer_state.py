"""Another optimizer's state, in the same layout and in others: refused, and nothing has changed."""

import itertools

import pytest
import torch
from torch import nn

from internvl_ds.checkpoint.optimizer_state import RunningOptimizer, SavedTensor
from internvl_ds.engine.optimizer_trial import NUMBER
from internvl_ds.errors import CheckpointMismatch
from tests.checkpoint import optimizers
from tests.checkpoint.optimizers import GROUPS, KINDS
from tests.harness.ranks import run_ranks

STAGES = (0, 1, 2, 3)


def test_a_large_tensor_is_tried_as_a_small_one():
    optimizer = torch.optim.Adafactor([nn.Parameter(torch.ones(2))], lr=1e-3)
    running, group = RunningOptimizer(optimizer), optimizer.param_groups[0]
    large = torch.empty(1).expand(1 << 20, 1 << 20)  # 4 TiB, of which 4 bytes are there
    kept = running.kept(group, large)
    assert not kept.exact
    for shape, fits in (((1 << 20, 1), True), ((1 << 20,), False)):
        saved = {'row_var': shape, 'col_var': (1, 1 << 20), 'step': NUMBER}
        found = [(SavedTensor(['x'], saved, {}), group, large)]
        if fits:
            assert running.require_saved_by('tag', 'Adafactor', False, found) == []
        else:
            with pytest.raises(CheckpointMismatch, match='only in the layout that it was saved in'):
                running.require_saved_by('tag', 'Adafactor', False, found)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """For each rank, 'stage kind' -> the tags of two ranks, and what their runs saw next."""
    root = tmp_path_factory.mktemp('kinds')
    return run_ranks(optimizers.save_kinds, 2, root, root=root, stages=STAGES)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('ranks', [1, 2])
def test_every_ordered_pair_of_optimizers(tmp_path, saved, ranks):
    # Into each stage, tags of another, and on as many ranks those of its own.
    sources = {stage: [(stage + 1) % 4, stage][:ranks] for stage in STAGES}
    results = run_ranks(optimizers.load_kinds, ranks, tmp_path, saved=saved[0], sources=sources)
    for rank, found in enumerate(results):
        for stage, kind in itertools.product(STAGES, KINDS):
            said, runs = found[f'{stage} {kind}'], saved[rank]
            for source, other in itertools.product(sources[stage], KINDS):
                if other != kind:
                    path = runs[f'{source} {other}']['path']
                    _is_refused(said[f'{source} {other}'], path, other, kind)
            for source in sources[stage]:
                own = {'error': '', **runs[f'{source} {kind}']}
                case = f'{source} -> {stage} on {ranks}, {kind}'
                # On another number of ranks the sums are rounded otherwise; in another layout the
                # tensors are others.
                keys = {'error', 'named', *(['named later'] if ranks == 2 else [])}
                keys |= {'then', 'later'} if (ranks, stage) == (2, source) else set()
                for key in keys:
                    assert said[str(source)][key] == own[key], (case, key)
            if ranks == 2:
                assert said['then'] == runs[f'{stage} {kind}']['named'], (stage, kind)


def _is_refused(error, path, saved, running):
    case = f'{saved} -> {running}: {error}'
    assert error.startswith(f'CheckpointMismatch: {path}: holds '), case
    assert f' of {KINDS[saved][1]} for ' in error, case
    assert f', and {KINDS[running][1]} keeps ' in error, case
    for kind in (saved, running):
        assert all(key in error for key in KINDS[kind][2]), case
        assert KINDS[kind][2] or 'no state' in error, case
    assert 'it was saved with another optimizer' in error, case
    assert 'MODEL.PRETRAINED' in error, case
    assert 'EVAL_MODE' in error, case


@pytest.mark.ranks
@pytest.mark.slow
def test_groups_that_differ_in_a_flag_are_compared_one_by_one(tmp_path):
    more = {'table': 'GROUPS'}
    runs = run_ranks(optimizers.save_kinds, 2, tmp_path, root=tmp_path, stages=[0, 1], **more)
    sources = {0: [0, 1], 1: [0, 1]}
    for rank, found in enumerate(
        run_ranks(optimizers.load_kinds, 2, tmp_path, saved=runs[0], sources=sources, **more)
    ):
        for stage, source, kind in itertools.product((0, 1), (0, 1), GROUPS):
            said, flag = found[f'{stage} {kind}'], kind.split(',')[0]
            for other in GROUPS.keys() - {kind}:
                error = said[f'{source} {other}']
                assert error.startswith('CheckpointMismatch: '), (kind, other)
                assert (f"'{flag}': (" in error) == other.startswith(flag), (kind, other, error)
            own = {'error': '', **runs[rank][f'{source} {kind}']}
            for key in ('error', 'named', 'named later'):
                assert said[str(source)][key] == own[key], (source, stage, kind, key)


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
def test_what_class_and_keys_do_not_say_alike(tmp_path):
    loads = [
        # loads, which may be with a warning
        ('adamw', 'foreach', 1, 'differ'),
        ('adamw', 'fused', 1, 'differ'),
        ('fused', 'adamw', 1, 'differ'),
        ('fused', 'adamw', 2, 'differ'),
        ('adam', 'adamw', 1, 'AdamW goes on from the state of Adam'),
        ('adamw', 'adam', 0, 'Adam goes on from the state of AdamW'),
        ('shy', 'shy', 1, ''),
        ('shy', 'shy', 0, ''),
        ('plain adamw', 'adamw', 1, ''),
        ('plain adamw', 'adam', 1, 'differ'),
        ('plain sgd', 'sgd', 1, ''),
        ('plain shy', 'shy', 1, 'what Shy keeps cannot be told'),
        ('plain shy', 'shy', 2, 'what Shy keeps cannot be told'),
        # equal keys of another meaning
        ('radam', 'adamw', 1, None),
        ('adamw', 'radam', 0, None),
        ('nadamw', 'adamw', 1, None),
        ('shy', 'momentum', 1, None),
        ('adamw', 'shy', 1, None),
        # no state, of an optimizer that keeps none or is not named
        ('plain sgd', 'adamw', 1, None),
        ('plain sgd', 'momentum', 2, None),
        ('plain adamw', 'sgd', 1, None),
        # before the first update
        ('new adamw', 'adamw', 1, ''),
        ('new adamw', 'amsgrad', 1, 'differ'),
        ('new sgd', 'momentum', 2, 'differ'),
        ('new plain adamw', 'adamw', 1, ''),
        ('new adamw', 'sgd', 1, None),
        ('new sgd', 'adamw', 0, None),
    ]
    results = run_ranks(
        optimizers.load_classes, 2, tmp_path,
        root=tmp_path, stage=1, loads=[load[:3] for load in loads],
    )  # fmt: skip
    for result in results:
        for (*load, expected), (said, warnings) in zip(loads, result, strict=True):
            of_optimizer = [w for w in warnings if 'optimizer' in w or 'goes on from' in w]
            if expected is None:
                assert said.startswith('CheckpointMismatch: '), load
                assert 'it was saved with another optimizer' in said, load
            else:
                assert said == '', load
                assert any(expected in w for w in of_optimizer) or not expected, (load, warnings)
                assert bool(of_optimizer) == bool(expected), (load, warnings)


@pytest.mark.ranks
@pytest.mark.slow
def test_an_originals_file_of_another_optimizer(tmp_path):
    for result in run_ranks(optimizers.load_file, 2, tmp_path, folder=tmp_path):
        for running, kind in itertools.product(('adamw', 'sgd', 'momentum'), KINDS):
            said = result[f'{kind} -> {running}']
            if kind == running:
                assert said == ''
                continue
            held = ', '.join(KINDS[kind][2])
            assert said.startswith(f'CheckpointMismatch: {tmp_path}/{running}{kind}.pth: holds ')
            assert (f'[{held}' if held else 'no state') in said
            assert f'{KINDS[running][1]} keeps ' in said
            assert 'it was saved with another optimizer' in said


@pytest.mark.ranks
@pytest.mark.slow
def test_what_an_optimizer_counts_in_its_groups_goes_on(tmp_path):
    for result in run_ranks(optimizers.load_counted, 2, tmp_path, root=tmp_path):
        assert len(result) == 12
        assert result == dict.fromkeys(result, True)


@pytest.mark.ranks
def test_an_engine_without_an_optimizer_says_so(tmp_path):
    for found in run_ranks(optimizers.load_without_optimizer, 1, tmp_path, root=tmp_path):
        assert found == ['CheckpointError: this engine has no optimizer: load with EVAL_MODE'] * 2
