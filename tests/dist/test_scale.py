"""What a meeting costs a rank does not grow with their number; ranks simulated in one process."""

import pytest

from internvl_ds.dist import rendezvous as meetings
from internvl_ds.errors import RankError
from tests.harness.simulated import Store, simulate

_FEW, _MANY = 8, 128

MEETINGS = {
    'equal': lambda: meetings.exchange('x', {'value': 'the same'}, 60),
    'from rank 0': lambda: meetings.from_rank_0('x', lambda: 'staging', 60),
    'agree': lambda: meetings.agree('x', lambda: None, 60),
    'gather': lambda: meetings.gather('x', {'files': 50 * '-'}, 60),
}


def _twice(meet):
    """The second meeting of a name also removes what the first has left."""
    return lambda: [meet(), meet()]


@pytest.mark.parametrize('what', MEETINGS)
def test_calls_of_the_store_by_each_rank_are_as_many_of_8_ranks_as_of_128(what):
    few, _ = simulate(_FEW, _twice(MEETINGS[what]))
    many, _ = simulate(_MANY, _twice(MEETINGS[what]))
    assert many[0].calls == few[0].calls
    assert max(one.calls for one in many) == max(one.calls for one in few) < 40


@pytest.mark.parametrize('what', ['equal', 'from rank 0', 'agree'])
def test_what_a_rank_reads_does_not_grow_where_all_but_rank_0_say_the_same(what):
    def most(ranks):
        counts, _ = simulate(ranks, MEETINGS[what])
        # The last to come puts all texts together, and each of the others reads the result.
        return sorted(one.bytes for one in counts)[-2]

    assert most(_MANY) <= most(_FEW) + 10  # the count has more digits


def test_gather_hands_rank_0_alone_what_each_brought_and_leaves_one_key_a_rank():
    store = Store()
    _, results = simulate(_MANY, _twice(lambda: meetings.gather('x', meetings.rank(), 60)), store)
    assert results[0] == [list(range(_MANY))] * 2
    assert results[1:] == [[None, None]] * (_MANY - 1)
    # Of the last meeting: its texts, who has read them, what was brought, and two counts.
    assert len(store) <= 3 * _MANY + 4


def test_who_is_missing_is_found_in_logarithmic_many_calls():
    def absent():
        if meetings.rank() == 77:
            return None
        with pytest.raises(RankError, match='rank 77 did not come') as caught:
            meetings.exchange('x', None, 0.2)
        return str(caught.value)

    counts, results = simulate(_MANY, absent)
    assert sum(result is not None for result in results) == _MANY - 1
    # One look at all, then at two halves of each of 7 levels; the rest are looks while it waits.
    looks = [one.looks for one in counts]
    assert max(looks) <= 15
