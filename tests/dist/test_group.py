"""The process group object of a process without other ranks."""

import pytest

from internvl_ds.config.tree import default_of
from internvl_ds.dist.group import current_group, drop_group
from internvl_ds.dist.process_group import before_shutdown, shutdown


@pytest.fixture(autouse=True)
def _fresh():
    drop_group()
    yield
    drop_group()
    current_group().limits.clear()


def test_shutdown_calls_each_callback_once_the_last_added_first():
    done = []
    first, second = (lambda: done.append('first')), (lambda: done.append('second'))
    for callback in (first, second, first):
        before_shutdown(callback)
    shutdown()
    shutdown()
    assert done == ['second', 'first']


def test_what_shutdown_drops_and_what_holds_until_the_process_ends():
    group = current_group()
    group.limits['EXIT_TIMEOUT'] = 7.0
    group.hook, group.over, group.timeout, group.start = print, True, 5.0, 'started'
    group.rounds['meeting'] += 1
    group.part(list).append('kept above')
    shutdown()
    new = current_group()
    assert new is not group
    assert (new.hook, new.over, new.limit('EXIT_TIMEOUT')) == (print, True, 7.0)
    assert new.limit('SILENT_AFTER') == default_of('COMM.SILENT_AFTER')
    assert (new.timeout, new.start, dict(new.rounds), new.part(list)) == (None, '', {}, [])
    new.hook, new.over = None, False


def test_a_callback_that_fails_is_an_error_after_the_group_is_left():
    group = current_group()

    def fail():
        raise ValueError('the last save')

    before_shutdown(fail)
    with pytest.raises(ValueError, match='the last save'):
        shutdown()
    assert current_group() is not group


def test_keys_are_of_one_group_and_one_start(monkeypatch):
    monkeypatch.delenv('TORCHELASTIC_RESTART_COUNT', raising=False)
    group = current_group()
    assert group.key('x') == f'internvl_ds/0.{group.number}/x'
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '2')
    assert group.key('x') == f'internvl_ds/2.{group.number}/x'
    shutdown()
    assert current_group().key('x') == group.key('x')  # nobody was met under it


def test_ranks_are_named_as_far_as_they_are_known():
    group = current_group()
    assert group.named([1, 3]) == 'rank 1, rank 3'
    assert group.named(list(range(20)), most=2) == 'rank 0, rank 1 and 18 more'
    group.names = ['rank 0 on a (pid 1)', 'rank 1 on b (pid 2)']
    assert group.named([1]) == 'rank 1 on b (pid 2)'
    assert (group.dead_ranks(), group.dead_holder()) == ([], '')
