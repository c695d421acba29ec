"""Which processes end with a rank, and which it leaves alone."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from internvl_ds.errors import DataError
from internvl_ds.train.workers import Loader
from tests.dist import ending
from tests.harness.ranks import run_ranks
from tests.harness.training import write_folder


@pytest.mark.first
@pytest.mark.ranks
def test_only_workers_of_loaders_are_killed_at_exit(tmp_path):
    data = write_folder(tmp_path / 'images', classes=3, train=24, val=6)
    (workers,) = run_ranks(ending.beside_a_child, 1, tmp_path, folder=tmp_path, data=data)
    assert (tmp_path / 'ended in order 0').exists()
    assert len(workers) == 2
    assert not [pid for pid in workers if Path(f'/proc/{pid}').exists()]


class Stuck:
    """A data set of an image that never comes."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_worker_that_stands_still_is_named_at_the_limit():
    begin = time.monotonic()
    with pytest.raises(DataError, match=r'within COMM.TIMEOUT \(2 s\): one of the processes \d+ '):
        list(Loader(Stuck(), num_workers=1, limit=2))
    for worker in multiprocessing.active_children():
        worker.kill()
    assert time.monotonic() - begin < 60


def test_an_error_in_a_worker_is_that_error():
    with pytest.raises(AttributeError, match='no_such_name'):
        list(Loader([0], num_workers=1, limit=60, collate_fn=lambda batch: os.no_such_name))
