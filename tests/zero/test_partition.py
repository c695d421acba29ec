"""Where parameters lie in flat tensors: every element once, in order. Pure."""

import math

import pytest

from internvl_ds.zero.partition import Place, Runs, Slices, describe, owned, shapes_of

GROUPS = [{'a': (3, 5), 'b': (7,)}, {'c': (1,), 'd': (2, 2)}]


def _layouts(ranks):
    totals = [sum(math.prod(s) for s in group.values()) for group in GROUPS]
    sizes = [math.ceil(total / (2 * ranks)) * 2 for total in totals]  # padded to 2 a rank
    return [Slices(GROUPS, ranks), Runs(GROUPS, None, sizes, ranks)]


@pytest.mark.parametrize('ranks', [1, 2, 3, 4, 30])
def test_every_element_lies_in_one_place(ranks):
    for layout in _layouts(ranks):
        taken = set()
        for name, shape in shapes_of(layout).items():
            places = list(layout.places(name))
            assert [p.start for p in places] == [0, *(p.stop for p in places[:-1])]
            assert places[-1].stop == math.prod(shape)
            for place in places:
                run = range(place.offset, place.offset + place.stop - place.start)
                assert run.stop <= layout.least_length(place.rank, place.group)
                cells = {(place.rank, place.group, at) for at in run}
                assert not cells & taken
                taken |= cells
        assert len(taken) == 27
        by_rank = [owned(layout, rank) for rank in range(ranks)]
        assert sum(p.stop - p.start for groups in by_rank for g in groups for _, p in g) == 27


def test_slices_are_of_equal_length_and_the_last_ones_may_be_short_or_empty():
    layout = Slices([{'a': (5,), 'b': (2,)}], 3)
    assert list(layout.places('a')) == [
        Place(0, 0, 0, 0, 2),
        Place(1, 0, 0, 2, 4),
        Place(2, 0, 0, 4, 5),
    ]
    assert list(layout.places('b')) == [Place(0, 0, 2, 0, 1), Place(1, 0, 2, 1, 2)]
    assert layout.least_length(2, 0) == 3


def test_runs_are_cut_where_a_rank_ends_and_gaps_are_left_out():
    layout = Runs([{'a': (5,), 'b': (4,)}], [[3, 0]], [6], 2)
    assert list(layout.places('a')) == [Place(0, 0, 0, 0, 5)]
    assert list(layout.places('b')) == [Place(1, 0, 2, 0, 4)]
    assert [layout.least_length(rank, 0) for rank in range(4)] == [6, 6, 0, 0]


def test_a_layout_in_words():
    assert describe(2, 4, 'bf16') == 'ZeRO stage 2 on 4 ranks in bf16'
    assert describe(0, 1, 'fp32') == 'ZeRO stage 0 on 1 rank in fp32'
