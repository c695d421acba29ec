"""Weights that are written are there before DeepSpeed's own streams read them, as clocks show."""

import pytest

from tests.harness.model import PERSISTENT
from tests.harness.ranks import run_ranks
from tests.zero import streams

WRITES = ['update', 'push', 'swap', 'load']
RACE = 'aten.cat.out on stream 1 after aten.copy_.default on stream 0'


@pytest.mark.ranks
@pytest.mark.parametrize('stage', [2, 3, PERSISTENT])
def test_no_stream_reads_weights_before_they_are_written(tmp_path, stage):
    for found in run_ranks(streams.races, 2, tmp_path, stage=stage, output=tmp_path):
        assert found == {name: [] for name in WRITES}


@pytest.mark.ranks
def test_without_this_packages_order_the_clocks_show_the_races(tmp_path):
    """DeepSpeed's next forward pass gathers on a stream that waits for nothing."""
    for found in run_ranks(streams.races, 2, tmp_path, stage=3, output=tmp_path, mended=False):
        # A load of DeepSpeed's waits for the device itself.
        assert all(RACE in found[name] for name in WRITES if name != 'load'), found
