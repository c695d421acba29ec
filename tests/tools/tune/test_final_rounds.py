"""Who comes to the finals, in what order, and who wins them."""

import pytest

from internvl_ds.tools.tune.final_rounds import (
    MOST_FINALISTS,
    finalists,
    frontier,
    order_of_round,
    standings,
)
from internvl_ds.tools.tune.records import BASE, CRASH, FINAL, OK, SEARCH, SHIPPED, Row


def row(key, speed, kind=SEARCH, number=-1):
    status = OK if speed else CRASH
    bench = {'images_per_s': speed} if speed else {}
    return Row(0, kind, key, key, {}, {}, {}, status, bench=bench, round=number)


def final(number, **speeds):
    return [row(key, speed, FINAL, number) for key, speed in speeds.items()]


def test_the_best_that_ships_the_one_given_and_three_others_are_in():
    rows = [
        row('base', 5.0, BASE), row('z1', 8.0, SHIPPED), row('z2', 7.0, SHIPPED),
        row('a', 1.0), row('b', 9.0), row('c', 10.0), row('d', 0.0),
    ]  # fmt: skip
    keys = finalists(rows, {'z1', 'z2'}, 'base')
    # the second that ships was faster than a
    assert keys == ['z1', 'base', 'c', 'b', 'z2']
    assert len(keys) == MOST_FINALISTS


def test_the_configuration_given_can_itself_be_one_that_ships():
    rows = [row('z0', 8.0, BASE), row('z1', 7.0, SHIPPED)]
    assert finalists(rows, {'z0', 'z1'}, 'z0') == ['z0', 'z1']


def test_without_one_that_ships_the_one_given_is_the_reference():
    assert finalists([row('base', 5.0, BASE), row('z1', 0.0, SHIPPED)], {'z1'}, 'base') == ['base']


def test_rounds_have_orders_of_their_own_which_stay():
    keys = list('abcde')
    orders = [order_of_round(keys, 0, number) for number in range(4)]
    assert all(sorted(order) == keys for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert orders == [order_of_round(keys, 0, number) for number in range(4)]


def test_the_median_of_paired_rounds_decides():
    # In the first round all is slow; 'lucky' has the best single speed, 'good' wins two of three.
    rows = [
        *final(0, ref=1.0, good=1.2, lucky=0.9),
        *final(1, ref=10.0, good=11.0, lucky=30.0),
        *final(2, ref=10.0, good=11.0, lucky=9.0),
    ]
    order = standings(rows, ['ref', 'good', 'lucky'])
    assert [standing.key for standing in order] == ['good', 'ref', 'lucky']
    assert order[0].ratios == pytest.approx((1.2, 1.1, 1.1))
    assert (order[0].median, order[0].speed) == pytest.approx((1.1, 11.0))


def test_the_reference_wins_unless_another_is_faster():
    rows = [*final(0, ref=10.0, other=9.9), *final(1, ref=10.0, other=10.1)]
    rows += final(2, ref=10.0, other=10.0)
    assert [s.key for s in standings(rows, ['ref', 'other'])] == ['ref', 'other']


def test_who_fails_in_the_finals_does_not_win():
    rows = [
        *final(0, ref=10.0, other=0),
        *final(1, ref=10.0, other=20.0),
        *final(2, ref=9.0, other=0),
    ]
    order = standings(rows, ['ref', 'other'])
    assert [s.key for s in order] == ['ref', 'other']
    assert order[1].ratios == (0.0, 2.0, 0.0)


def test_a_reference_that_never_runs_again_is_no_measure():
    rows = [*final(0, ref=0, a=3.0, b=4.0), *final(1, ref=0, a=3.0, b=5.0)]
    assert [s.key for s in standings(rows, ['ref', 'a', 'b'])] == ['b', 'a', 'ref']


def test_the_frontier_leaves_out_what_is_beaten_in_both():
    points = {
        'lean': (1.0, 5.0), 'beaten': (2.0, 4.0), 'better': (2.0, 8.0), 'same': (3.0, 8.0),
        'fast': (4.0, 9.0),
    }  # fmt: skip
    assert frontier(points) == ['lean', 'better', 'fast']
    assert frontier({}) == []
