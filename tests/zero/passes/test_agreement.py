"""Ranks that skip a layer, or take layers in another order, stop before an update is applied."""

import pytest

from tests.harness.ranks import RankFailed, run_ranks
from tests.zero.passes import agreeing


@pytest.mark.ranks
@pytest.mark.parametrize('stage', [1, 2])
def test_a_first_pass_that_differs_is_refused_on_all_ranks_before_it_is_reduced(tmp_path, stage):
    said = run_ranks(agreeing.train, 2, tmp_path, timeout=60, stage=stage, name='one skips')
    assert said[0] == said[1]
    assert said[0]['updates'] == 0
    assert said[0]['error'].startswith(
        'the first backward makes gradients on rank 0 alone of left.weight, left.bias. '
        'At ZeRO stages 1 to 3 the ranks must use the same layers in the same order'
    )


@pytest.mark.ranks
@pytest.mark.parametrize('manual', [False, True])
@pytest.mark.parametrize('stage', [1, 2, 3])
def test_gradients_of_equal_sizes_are_not_mixed(tmp_path, stage, manual):
    said = run_ranks(
        agreeing.train, 2, tmp_path, timeout=60, stage=stage, name='another layer', manual=manual
    )
    assert said[0] == said[1]
    assert 'on rank 0 alone of left.weight, left.bias; rank 1 alone of right' in said[0]['error']


@pytest.mark.ranks
@pytest.mark.parametrize('accumulation', [1, 2])
@pytest.mark.parametrize('stage', [1, 2])
def test_an_order_that_differs_is_refused(tmp_path, stage, accumulation):
    said = run_ranks(
        agreeing.train, 2, tmp_path, timeout=60, stage=stage, name='another order',
        accumulation=accumulation,
    )  # fmt: skip
    assert said[0] == said[1]
    assert said[0]['updates'] == 0
    assert 'in another order: rank 0 of right.' in said[0]['error']


@pytest.mark.ranks
@pytest.mark.parametrize(('name', 'updates'), [('later', 3), ('after both were seen', 3)])
def test_a_later_pass_that_differs_is_not_applied(tmp_path, name, updates):
    if name == 'later':  # rank 0 has seen nothing, and waits in the step
        with pytest.raises(RankFailed, match=r'ConfigError: a backward of rank 1 made other grad'):
            run_ranks(agreeing.train, 2, tmp_path, timeout=90, stage=2, name=name)
        return
    said = run_ranks(agreeing.train, 2, tmp_path, timeout=60, stage=2, name=name)
    assert said[0] == said[1]
    assert said[0]['updates'] == updates
    assert 'rank 0 alone of right.weight, right.bias; rank 1 alone of left' in said[0]['error']


@pytest.mark.ranks
@pytest.mark.parametrize('accumulation', [1, 2])
@pytest.mark.parametrize('stage', [0, 1, 2, 3])
def test_layers_that_all_ranks_use_in_turns_train_as_in_plain_pytorch(
    tmp_path, stage, accumulation
):
    right = agreeing.plain('in turns')
    for result in run_ranks(
        agreeing.train, 2, tmp_path, timeout=60, stage=stage, name='in turns',
        accumulation=accumulation,
    ):  # fmt: skip
        for name, values in right.items():
            # Six sums of gradients below 1, each rounded to 2^-24, at a learning rate of 0.1.
            assert result[name] == pytest.approx(values, rel=1e-6, abs=1e-6), name
