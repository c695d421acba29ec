"""Matrices that lie in parts on the ranks: who gets which, and that they come back."""

import pytest

from internvl_ds.zero.muon.exchange import shared_out
from internvl_ds.zero.partition import Runs, Slices
from tests.harness.ranks import run_ranks
from tests.zero.muon import orthogonalising

SHAPES = [dict.fromkeys('abcdef', (4, 4))]


def test_at_stage_3_each_rank_gets_as_many():
    (owners,) = shared_out(Slices(SHAPES, 2), 0)
    assert sorted(owners.values()) == [0, 0, 0, 1, 1, 1]


def test_at_stages_1_and_2_a_matrix_stays_with_the_rank_that_has_it():
    layout = Runs(SHAPES, None, [28], 4)  # cuts b, d and f
    (owners,) = shared_out(layout, 0)
    assert [owners[name] for name in 'ace'] == [0, 1, 2]
    assert [owners[name] for name in 'bdf'] == [0, 1, 3]  # who had less to do


def test_no_rank_gets_more_at_once_than_the_limit():
    rounds = shared_out(Slices(SHAPES, 2), 0, limit=32)
    assert [len(owners) for owners in rounds] == [4, 2]
    assert [len(owners) for owners in shared_out(Slices(SHAPES, 2), 0, limit=5)] == [2, 2, 2]


def test_a_parameter_without_elements_is_nobody_s():
    assert shared_out(Slices([{'a': (0, 4)}], 2), 0) == []


@pytest.mark.first
@pytest.mark.ranks
def test_what_became_of_whole_matrices_comes_back_in_parts(tmp_path):
    for told in run_ranks(orthogonalising.exchange, 2, tmp_path):
        assert len(told) >= 8
        assert all(told)
