"""Averages of models whose state dict does not hold all: in any layout, and from an original."""

import pytest

from tests.checkpoint import proving
from tests.checkpoint.proving import FAMILIES
from tests.harness.ranks import run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.mark.first
def test_buffers_that_no_state_dict_has_tied_and_complex_tensors_move_with_the_average(tmp_path):
    """2 ranks -> 2 ranks, and 2 ranks -> 1, from every stage into another, and from a .pth."""
    two = run_ranks(
        proving.move_averages, 2, tmp_path, root=tmp_path / '2',
        names=['windows'], sources=[],
    )  # fmt: skip
    one = run_ranks(
        proving.move_averages, 1, tmp_path, root=tmp_path / '1',
        names=['windows', *FAMILIES], sources=[tmp_path / '2'],
    )  # fmt: skip
    assert len(two[0]) == 8
    assert len(one[0]) == 8 * (2 + len(FAMILIES))
    for result in (*two, *one):
        assert {way: names for way, names in result.items() if names} == {}
