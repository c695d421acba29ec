"""A parameter without a gradient in an update is left alone as in plain PyTorch, or refused."""

import pytest

from tests.harness.ranks import run_ranks
from tests.zero.passes import leaving_out

CELLS = [(way, name) for way in leaving_out.WAYS for name in leaving_out.OPTIMIZERS]
OF_ALL_RANKS = [cell for cell in CELLS if cell[0] != 'each its own' and cell[1] != 'around']


def require_equal(weights, right):
    for name, values in right.items():
        # Six updates of gradients that are rounded to 2^-24; AdamW divides them by their size.
        assert weights[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


@pytest.mark.ranks
@pytest.mark.parametrize('ranks', [1, 2])
def test_stage_0_leaves_alone_what_no_rank_has_used(tmp_path, ranks):
    for results in run_ranks(leaving_out.train, ranks, tmp_path, timeout=120, cells=CELLS, stage=0):
        for (way, optimizer), weights in zip(CELLS, results, strict=True):
            require_equal(weights, leaving_out.plain(way, optimizer))


@pytest.mark.ranks
@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('stage', [1, 2, 3])
def test_sharded_stages_refuse_what_a_gradient_of_zero_would_move(tmp_path, stage, ranks):
    cells = OF_ALL_RANKS
    for results in run_ranks(
        leaving_out.train, ranks, tmp_path, timeout=180, cells=cells, stage=stage
    ):
        for (way, optimizer), result in zip(cells, results, strict=True):
            if (way, optimizer) in leaving_out.HARMLESS:
                require_equal(result, leaving_out.plain(way, optimizer))
                continue
            # The first update lacks `right`, which weight decay would move at once.
            decays = optimizer in ('adamw', 'lookahead')
            first = 3 if way == 'at last' else 1
            assert result['updates'] == (0 if decays else first), (way, optimizer)
            name = 'left' if way == 'in turns' and not decays else 'right'
            assert f'{name}.bias, {name}.weight' in result['error']
            assert 'ZeRO stage 0' in result['error']
            way_out = 'requires_grad_(False)' if decays else 'times 0'
            assert way_out in result['error']


@pytest.mark.ranks
@pytest.mark.parametrize('ranks', [1, 2])
def test_a_gradient_of_zero_from_a_backward_is_kept(tmp_path, ranks):
    for results in run_ranks(leaving_out.used_with_zeros, ranks, tmp_path, timeout=60):
        for result in results:
            require_equal(result['got'], result['right'])


@pytest.mark.ranks
def test_gradients_of_what_is_frozen_within_an_update_are_reduced(tmp_path):
    right = leaving_out.plain_frozen_within()
    for weights in run_ranks(leaving_out.freeze_within, 2, tmp_path, timeout=60):
        require_equal(weights, right)


@pytest.mark.ranks
@pytest.mark.parametrize('stage', [1, 3])
def test_a_loop_of_its_own_is_refused_what_was_frozen_after_initialize(tmp_path, stage):
    said = run_ranks(leaving_out.freeze_within, 1, tmp_path, timeout=60, manual_at=stage)[0]
    assert 'right.weight' in said['error']
    assert 'were frozen after the engine was made to train them' in said['error']


@pytest.mark.ranks
def test_the_step_of_an_optimizer_around_another_counts_as_applied(tmp_path):
    counts = run_ranks(leaving_out.applied, 1, tmp_path, timeout=60)[0]
    assert counts == {'adamw': [3, 0], 'around': [3, 0], 'lookahead': [3, 0]}


@pytest.mark.ranks
def test_half_precision_at_stage_0_moves_only_what_a_rank_has_used(tmp_path):
    right = []
    for first, second in zip(*leaving_out.WAYS['each its own'], strict=True):
        layers = {'l': 'left', 'r': 'right'}
        right.append({'stem', 'head', *(layers[way] for way in first + second)})
    for moved in run_ranks(leaving_out.moved_in_half_precision, 2, tmp_path, timeout=60):
        assert [{name.partition('.')[0] for name in names} for names in moved] == right


@pytest.mark.ranks
@pytest.mark.parametrize('stages', [[0, 0], [1, 1], [2, 3], [0, 1], [0, 3], [3, 0]])
def test_a_resumed_run_knows_what_was_never_used(tmp_path, stages):
    right = leaving_out.plain('never', 'adam')
    for weights in run_ranks(
        leaving_out.resume, 2, tmp_path, timeout=120, stages=stages, way='never',
        optimizer='adam', output=str(tmp_path / 'never'),
    ):  # fmt: skip
        require_equal(weights, right)
    for result in run_ranks(
        leaving_out.resume, 2, tmp_path, timeout=120, stages=stages, way='at last',
        optimizer='adam', output=str(tmp_path / 'at last'),
    ):  # fmt: skip
        if stages[-1] == 0:
            require_equal(result, leaving_out.plain('at last', 'adam'))
        else:
            assert 'right.bias, right.weight: a gradient in some updates' in result['error']


@pytest.mark.ranks
def test_a_run_that_was_resumed_without_its_scaler_looks_at_the_optimizers_state(tmp_path):
    right = leaving_out.plain('never', 'adam')
    for weights in run_ranks(
        leaving_out.resume, 2, tmp_path, timeout=120, stages=[2, 2], way='never',
        optimizer='adam', output=str(tmp_path / 'out'), with_scaler=False,
    ):  # fmt: skip
        require_equal(weights, right)


@pytest.mark.ranks
@pytest.mark.parametrize('stages', [[1, 1], [2, 3], [1, 0], [3, 0]])
def test_so_does_one_that_was_resumed_without_its_scaler(tmp_path, stages):
    for result in run_ranks(
        leaving_out.resume, 2, tmp_path, timeout=120, stages=stages, way='at last',
        optimizer='adam', output=str(tmp_path / 'at last'), with_scaler=False,
    ):  # fmt: skip
        if stages[-1] == 0:
            require_equal(result, leaving_out.plain('at last', 'adam'))
        else:
            assert 'right.bias, right.weight: a gradient in some updates' in result['error']


@pytest.mark.ranks
@pytest.mark.parametrize('stage', [1, 3])
def test_what_is_dropped_or_skipped_decides_nothing(tmp_path, stage):
    names = ('head', 'left', 'right', 'stem')
    layers = [f'{name}.{kind}' for name in names for kind in ('bias', 'weight')]
    for moved in run_ranks(leaving_out.dropped_and_skipped, 2, tmp_path, timeout=60, stage=stage):
        assert moved == {
            'zero_grad': ['right.bias, right.weight'],
            'skipped first': layers,
            'skipped later': layers,
            'lr 0': [name for name in layers if 'right' not in name],
        }


@pytest.mark.ranks
@pytest.mark.parametrize('stage', [0, 3])
def test_a_loss_without_a_gradient_on_one_rank_is_named(tmp_path, stage):
    texts = run_ranks(
        leaving_out.without_gradient, 2, tmp_path, expect_failure=True, timeout=90, stage=stage
    )
    assert 'ConfigError: the loss of this rank requires no gradient: no trained' in texts[1]
    assert 'rank 1 on ' in texts[1]
