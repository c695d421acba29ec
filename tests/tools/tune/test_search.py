"""The search: what it proposes, learns, and goes on from."""

import sys

import pytest

from internvl_ds.errors import InternvlDsError
from internvl_ds.tools.tune.search import Search
from internvl_ds.tools.tune.search_space import Choice, SearchSpace

SPACE = SearchSpace(
    {
        'stage': {label: Choice() for label in '0123'},
        'batch': {label: Choice() for label in ('16x1', '8x2', '4x4', '2x8')},
        'bucket': {label: Choice() for label in ('default', '50M', '5M')},
    },
    {'bucket': {'stage': ('1', '2', '3')}},
)


def speed(labels):
    """The fastest is stage 1 with 8x2 and 5M."""
    points = {'stage': '1', 'batch': '8x2', 'bucket': '5M'}
    return 10.0 + sum(labels.get(axis) == label for axis, label in points.items())


def test_proposals_leave_out_what_does_not_count():
    search = Search(SPACE, seed=0)
    seen = [search.propose() for _ in range(30)]
    assert {'bucket' in labels for labels in seen if labels['stage'] == '0'} == {False}
    assert {'bucket' in labels for labels in seen if labels['stage'] != '0'} == {True}


def test_it_proposes_more_often_what_was_fast():
    search = Search(SPACE, seed=0)
    speeds = []
    for _ in range(40):
        labels = search.propose()
        speeds.append(speed(labels))
        search.learn(labels, speeds[-1])
    assert sum(speeds[20:]) > sum(speeds[:20])
    assert max(speeds) == 13.0


def test_the_same_seed_proposes_the_same_and_going_on_proposes_something_else():
    one, other = Search(SPACE, seed=3), Search(SPACE, seed=3)
    first = [one.propose() for _ in range(6)]
    assert [other.propose() for _ in range(6)] == first
    known = [(labels, speed(labels)) for labels in first]
    again = Search(SPACE, seed=3, known=known)
    assert [again.propose() for _ in range(6)] != first


def test_without_optuna_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(InternvlDsError, match=r"pip install 'internvl_ds\[tune\]'"):
        Search(SPACE, seed=0)
