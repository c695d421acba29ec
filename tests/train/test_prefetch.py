"""Batches are copied beside the computation with the one before, in an order that clocks show."""

import pytest
import torch

from internvl_ds.train import prefetch
from internvl_ds.train.prefetch import on_device
from tests.harness.clocks import Clocks

CPU = torch.device('cpu')


# Made before the clocks run: the host's memory is of no stream.
BATCHES = [(torch.full((2, 3), float(n)), torch.tensor([n, n])) for n in range(3)]


def loader(taken):
    for batch in BATCHES:
        taken.append(batch)
        yield batch


@pytest.fixture
def copies(monkeypatch):
    """Moving a tensor to a device makes a copy, as to a GPU; to the CPU it would make none."""
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, 'to', lambda self, *_, **more: to(self, *_, **more | {'copy': True})
    )


def compute(batches, taken):
    seen = []
    for images, labels in batches:
        seen.append(((images * 2).sum().item() / 12, labels.tolist(), len(taken)))
    return seen


def test_without_streams_each_batch_is_taken_when_it_is_asked_for():
    taken = []
    seen = compute(on_device(loader(taken), CPU), taken)
    assert seen == [(0, [0, 0], 1), (1, [1, 1], 2), (2, [2, 2], 3)]


def test_with_streams_the_next_batch_is_copied_first_and_none_is_read_before_it_is_there(copies):
    taken = []
    with Clocks() as clocks:
        seen = compute(on_device(loader(taken), CPU), taken)
    assert seen == [(0, [0, 0], 2), (1, [1, 1], 3), (2, [2, 2], 3)]
    assert not clocks.races


def test_without_its_order_the_clocks_show_the_race(copies, monkeypatch):
    monkeypatch.setattr(prefetch, '_ready', lambda tensors, copied: tensors)
    taken = []
    with Clocks() as clocks:
        compute(on_device(loader(taken), CPU), taken)
    assert any('aten.mul' in race for race in clocks.races)


def test_no_batch_and_one_batch():
    for count in (0, 1):
        with Clocks():
            batches = on_device([(torch.ones(1),)] * count, CPU)
            assert [tensor.item() for (tensor,) in batches] == [1.0] * count
