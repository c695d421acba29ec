"""A tensor in pieces, read in any part. No processes."""

import pytest
import torch

from internvl_ds.errors import CheckpointError
from internvl_ds.zero.lazy_tensor import Flat, fill
from internvl_ds.zero.partition import Place

SHARDS = {(0, 0): torch.tensor([9.0, 0, 1, 2]), (1, 0): torch.tensor([3.0, 4, 5, 9])}
PLACES = [Place(0, 0, 1, 0, 3), Place(1, 0, 0, 3, 6)]


def _flat(opened=None):
    def source(rank, group):
        if opened is not None:
            opened.append(rank)
        return SHARDS[rank, group]

    return Flat('x', (2, 3), PLACES, source)


def test_a_part_opens_only_the_shards_that_it_lies_in():
    opened = []
    target = torch.empty(2)
    _flat(opened).copy_to(target, 1)
    assert target.tolist() == [1, 2]
    assert opened == [0]
    assert _flat().whole().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert _flat().whole(torch.bfloat16).dtype == torch.bfloat16


def test_what_is_not_there_is_an_error():
    with pytest.raises(CheckpointError, match='x: the shards hold 5 of 6 elements'):
        _flat().pieces(1, 7)
    short = Flat('x', (9,), [Place(0, 0, 1, 0, 9)], lambda *_: SHARDS[0, 0])
    with pytest.raises(CheckpointError, match='x ends at element 10 .* the shard has 4'):
        short.whole()


def test_a_whole_tensor_of_any_layout_in_memory_is_filled_in_order():
    target = torch.zeros(3, 2).t()  # its memory is in another order
    fill(target, [('x', Place(0, 0, 0, 0, 6))], {'x': _flat()})
    assert target.tolist() == [[0, 1, 2], [3, 4, 5]]
    places = [Place(0, 0, 1, 0, 2), Place(0, 0, 3, 2, 3), Place(1, 0, 0, 3, 6)]
    three = Flat('x', (6,), places, lambda rank, group: SHARDS[rank, group])
    target = torch.zeros(4)
    fill(target, [('x', Place(0, 0, 1, 2, 5))], {'x': three})  # a slice, from its third element on
    assert target.tolist() == [0, 2, 3, 4]
    assert three.whole().tolist() == [0, 1, 2, 3, 4, 5]
    assert Flat.of('y', torch.ones(4)).whole(torch.bfloat16).dtype == torch.bfloat16
    tied = torch.ones(4)
    assert Flat.of('y', tied).whole().data_ptr() == tied.data_ptr()  # nothing is copied
