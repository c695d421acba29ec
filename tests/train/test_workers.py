"""Which processes end with a rank, and which it leaves alone."""

from pathlib import Path

import pytest

from tests.harness.ranks import run_ranks
from tests.workers.training import write_folder


@pytest.mark.ranks
def test_only_workers_of_loaders_are_killed_at_exit(tmp_path):
    data = write_folder(tmp_path / 'images', classes=3, train=24, val=6)
    (workers,) = run_ranks(
        'tests.workers.ending:beside_a_child', 1, tmp_path, folder=tmp_path, data=data
    )
    assert (tmp_path / 'ended in order 0').exists()
    assert len(workers) == 2
    assert not [pid for pid in workers if Path(f'/proc/{pid}').exists()]
