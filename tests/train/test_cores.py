"""The cores that a rank takes of its host, without ranks."""

import os

import pytest
import torch

from internvl_ds.train import cores
from tests.harness.model import make_config


@pytest.mark.parametrize(
    ('masks', 'threads'),
    [
        ([range(8)], 8),
        ([range(8)] * 4, 2),  # shared
        ([range(8), range(8, 16)], 8),  # bound to cores of their own
        ([range(3)] * 4, 1),
    ],
)
def test_ranks_of_a_host_divide_the_cores_that_they_share(monkeypatch, masks, threads):
    told = []
    for mask in masks:  # each rank's word; rank 0's last
        monkeypatch.setattr(os, 'sched_getaffinity', lambda _, mask=mask: set(mask))
        monkeypatch.setattr(cores, 'exchange', lambda what, own, limit: told.append(own) or [own])
        monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)
        cores.share_cores(make_config())
    taken = []
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(cores, 'exchange', lambda what, own, limit: told)
    monkeypatch.setattr(torch, 'set_num_threads', taken.append)
    cores.share_cores(make_config())
    assert taken == [threads]
    monkeypatch.setenv('OMP_NUM_THREADS', '5')
    cores.share_cores(make_config())
    assert taken == [threads]
