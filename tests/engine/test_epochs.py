"""The beginning of an epoch: what workers and the process draw in it, whatever came before."""

import os
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from internvl_ds import start_epoch
from internvl_ds.engine.epochs import make_deterministic
from tests.harness.model import make_config


class Noise(Dataset):
    """Each item draws from all three generators of the process that it is read in."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.random(), float(torch.rand(()))])


class Loop:
    """A script's loader, and what it evaluates between epochs."""

    def __init__(self, workers, seed):
        torch.manual_seed(seed)
        self.config = make_config(SEED=seed)
        self.loader = self._loader(workers, True)
        self.other = self._loader(workers, False)

    def _loader(self, workers, shuffle):
        data = Noise()
        sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=shuffle)
        return DataLoader(
            data, 2, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
        )

    def epoch(self, number, begin):
        """The batches of an epoch and what the process draws after it, as one list."""
        begin(self, number)
        batches = torch.cat(list(self.loader)).tolist()
        return [*batches, random.random(), np.random.random(), float(torch.rand(()))]

    def evaluate(self):
        list(self.other)


def ours(loop, number):
    start_epoch(loop.config, loop.loader, number)


def theirs(loop, number):
    loop.loader.sampler.set_epoch(number)


def third_epoch_of_both(workers, begin):
    """Epoch 2 of a run that was not stopped, and of one that begins with it after a load."""
    whole = Loop(workers, 5)
    for number in range(2):
        whole.epoch(number, begin)
        saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
        whole.evaluate()
    expected = whole.epoch(2, begin)
    resumed = Loop(workers, 5)
    random.setstate(saved[0])
    np.random.set_state(saved[1])
    torch.set_rng_state(saved[2])
    resumed.evaluate()  # the original evaluates after a load
    return expected, resumed.epoch(2, begin)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_resumed_run_draws_as_one_that_was_not_stopped(workers):
    expected, found = third_epoch_of_both(workers, ours)
    assert found == expected


def test_with_set_epoch_alone_persistent_workers_draw_otherwise():
    expected, found = third_epoch_of_both(2, theirs)
    assert sorted(row[0] for row in found[:6]) == sorted(row[0] for row in expected[:6])
    assert [row[0] for row in found[:6]] == [row[0] for row in expected[:6]]  # the order is right
    assert [row[1:] for row in found[:6]] != [row[1:] for row in expected[:6]]
    assert found[-1] != expected[-1]  # nor does the process draw the same: a seed more was drawn


def test_epochs_and_seeds_differ():
    loop, other = Loop(0, 5), Loop(0, 6)
    assert loop.epoch(0, ours) != loop.epoch(1, ours)
    assert loop.epoch(0, ours) != other.epoch(0, ours)
    loop.loader.generator = torch.Generator()
    assert loop.epoch(0, ours) == loop.epoch(0, ours)


def test_an_operation_without_a_deterministic_algorithm_is_named(monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
    try:
        make_deterministic()
        with pytest.raises(RuntimeError, match='put_'):
            torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
        assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None)
