"""Weights that are written at stage 3 are there before DeepSpeed's own stream gathers them."""

import pytest

from tests.harness.ranks import run_ranks
from tests.zero import streams


@pytest.mark.ranks
def test_the_device_is_synchronized_after_weights_are_written(tmp_path):
    for seen in run_ranks(streams.written_before_synchronizing, 2, tmp_path):
        assert seen == [True, False, True]  # written; the average; the weights again
