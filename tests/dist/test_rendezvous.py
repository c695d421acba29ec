"""The named meetings, on real ranks."""

import json
import re
import subprocess
import sys
import time

import pytest

from internvl_ds.dist import rendezvous as meetings
from internvl_ds.dist.stranded import _has_limit
from tests.dist import talking, waiting
from tests.harness.ranks import ROOT, base_env, run_ranks


@pytest.mark.first
@pytest.mark.ranks
def test_meetings_exchange_agree_and_pass_errors_on(tmp_path):
    for rank, got in enumerate(run_ranks(talking.meet, 2, tmp_path)):
        assert got['rounds'] == [[[0, n], [1, n]] for n in range(3)]
        assert got['slow'] == [0, 1]
        failure = 'OSError: [Errno 28] No space left on device'
        assert got['agree'] == (
            failure if rank == 1 else f'CheckpointError: write: rank 1: {failure}'
        )
        assert got['after'] == rank
        assert got['rank 0'] == 'CheckpointNotFound: nothing there'
        assert got['told'] == {'path': 0}


@pytest.mark.ranks
@pytest.mark.parametrize('ranks', [2, 4])
def test_a_rank_that_does_not_come_is_named(tmp_path, ranks):
    results = run_ranks(talking.missing, ranks, tmp_path)
    for got in results[:-1]:
        missing = rf'waited 2 s and rank {ranks - 1} on \S+ \(pid \d+\) did not come'
        assert re.search(missing, got['message']), got
        # auto_resume_helper without a config: the limit of the engine's, or of the environment
        assert re.search(missing.replace('2 s', '3 s'), got['engine']), got
        assert re.search(missing.replace('2 s', '1 s'), got['environment']), got
    for got in results:
        assert got['later'] == list(range(ranks))


@pytest.mark.ranks
def test_a_meeting_ends_on_rank_0_when_all_have_read_what_it_holds(tmp_path):
    results = run_ranks(talking.rank_0_ends_at_once, 2, tmp_path, folder=tmp_path)
    assert results == [None, [0, 1]]


@pytest.mark.ranks
def test_a_meeting_reads_a_key_a_rank_and_one_text_where_all_are_equal(tmp_path):
    rounds, ranks = 5, 4
    results = run_ranks(talking.read_keys, ranks, tmp_path, rounds=rounds)
    for what in ('different', 'equal'):
        # One for each rank, and the last to come reads what all have brought.
        assert sum(got[what][0] for got in results) == rounds * 2 * ranks
    text = '{"value": "of all ' + 100 * '-' + '"}'
    brought = rounds * ranks * len(text)
    assert sum(got['equal'][1] for got in results) == brought + rounds * ranks * len(
        json.dumps([[text, ranks]])
    )


def test_alone_there_is_nothing_to_wait_for():
    assert meetings.exchange('x', {'a': 1}, 1) == [{'a': 1}]
    assert meetings.agree('x', lambda: 5, 1) == 5
    assert meetings.from_rank_0('x', lambda: 'y', 1) == 'y'
    assert (meetings.rank(), meetings.world_size()) == (0, 1)


@pytest.mark.ranks
def test_gather_hands_rank_0_what_each_rank_brought(tmp_path):
    results = run_ranks(talking.gather_twice, 3, tmp_path)
    assert results[0] == [[{'rank': r, 'round': n} for r in range(3)] for n in range(2)]
    assert results[1] == results[2] == [None, None]


@pytest.mark.ranks
def test_threads_meet_while_the_main_thread_waits_in_another_meeting(tmp_path):
    first, second = run_ranks(talking.meet_in_the_background, 2, tmp_path)
    # Rank 1 comes to the main meeting after its thread; on rank 0 either may be the last to read.
    assert second == ['threads of [0, 1]', 'main']
    assert sorted(first) == sorted(second)


@pytest.mark.ranks
def test_threads_meet_after_the_process_group_is_gone(tmp_path):
    results = run_ranks(talking.meet_after_the_group_is_gone, 2, tmp_path, timeout=30)
    assert results == [[0, 1], [0, 1]]


@pytest.mark.ranks
def test_a_rank_holds_two_connections_to_the_store(tmp_path):
    """This package's and torch's: the host of rank 0 has a limit of open files."""
    _, other = run_ranks(talking.connections_to_the_store, 2, tmp_path, folder=str(tmp_path))
    assert other == 2


def left_by_rank_0(folder):
    (path,) = folder.glob('ranks-*/result_0.json')
    return json.loads(path.read_text())


@pytest.mark.ranks
def test_who_dies_having_come_is_not_waited_for(tmp_path):
    run_ranks(waiting.a_rank_dies_as_it_comes, 2, tmp_path, expect_failure=True, folder=tmp_path)
    seconds, message = left_by_rank_0(tmp_path)
    assert (seconds < 15, message) == (True, 'no error')


@pytest.mark.ranks
def test_a_collective_that_failed_in_a_meeting_counts_as_its_wait(tmp_path):
    run_ranks(
        waiting.a_collective_in_a_meeting, 2, tmp_path, 60, expect_failure=True, grace=0,
        folder=tmp_path,
    )  # fmt: skip
    seconds, message = left_by_rank_0(tmp_path)
    assert 5 <= seconds < 9, seconds  # not 5 in each
    assert re.match(r'RankError: x: rank 0 waited 1 s and rank 1 .* Its own part failed: ', message)


@pytest.mark.ranks
@pytest.mark.parametrize('waits', ['at once', 'later'])
def test_a_collective_with_a_dead_rank_ends_where_gloo_does_not_notice(tmp_path, waits):
    start = time.monotonic()
    texts = run_ranks(
        waiting.a_rank_dies_whose_child_lives, 2, tmp_path, expect_failure=True, grace=40,
        folder=tmp_path, waits=waits,
    )  # fmt: skip
    assert time.monotonic() - start < 50  # the child lives for 60 s
    line = texts[0].splitlines()[-1]
    assert re.search(
        r'rank 0 on \S+ ends the job: rank 1 on \S+ \(pid \d+\) is dead .*; RankError: waited 4 s '
        r'in (all_reduce|wrapped_fn) \(.*\.py:\d+\) for a rank that is dead$',
        line,
    ), texts[0]
    assert list(tmp_path.glob('ranks-*/result_0.json'))  # exit functions have run


@pytest.mark.ranks
@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_a_wait_for_a_device_ends_when_another_rank_is_dead(tmp_path, device):
    """On a GPU a collective runs apart: Python waits for its result anywhere, and never hears."""
    texts = run_ranks(
        waiting.a_rank_dies_beside_a_device, 2, tmp_path, expect_failure=True, grace=40,
        folder=tmp_path, device=device,
    )  # fmt: skip
    told = re.search(
        r'rank 0 on \S+ ends the job: rank 1 on \S+ \(pid \d+\) is dead .*; RankError: waited 4 s '
        r'in a_rank_dies_beside_a_device \(.*\.py:\d+\) for a rank that is dead',
        texts[0],
    )
    assert bool(told) is (device == 'cuda'), texts[0]
    assert list(tmp_path.glob('ranks-*/result_0.json'))  # exit functions have run


@pytest.mark.ranks
@pytest.mark.parametrize('aborts', [True, False])
def test_a_rank_says_where_it_stands_before_a_collective_of_a_device_times_out(tmp_path, aborts):
    """At the limit NCCL's watchdog ends the process, or, where that is off, the rank itself."""
    texts = run_ranks(
        waiting.a_rank_stands_still_beside_a_device, 2, tmp_path, 90, expect_failure=True, grace=0,
        folder=tmp_path, aborts=aborts,
    )  # fmt: skip
    ended = re.search(
        r'RankError: stood for 5\.\d* s in a_rank_stands_still_beside_a_device \(.*\), and '
        r'COMM.TIMEOUT is 5 s; rank 1 on \S+ \(pid \d+\) has given no sign',
        texts[0],
    )
    assert bool(ended) is not aborts, texts[0]
    moving, words = left_by_rank_0(tmp_path)
    assert moving == []
    assert len(words) == 1
    assert re.match(
        r'rank 0 has stood for 4\.\d* s in a_rank_stands_still_beside_a_device \(.*waiting.py:'
        r'\d+\); .*COMM.TIMEOUT \(5 s\) ends it. rank 1 on \S+ \(pid \d+\) has given no sign',
        words[0],
    )


@pytest.mark.slow
def test_looking_at_the_main_thread_never_stops_the_process():
    """Where a collection falls into the look, Python 3.11 would wait for ever."""
    command = [sys.executable, '-m', 'tests.dist.looking', '3']
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, env=base_env(), cwd=ROOT
    )
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ['True']), done.stderr


def test_a_wait_of_this_package_has_a_limit_of_its_own():
    assert not _has_limit(sys._getframe())
    assert meetings.agree('x', lambda: _has_limit(sys._getframe()), 1)


@pytest.mark.ranks
def test_a_rank_that_left_in_order_ends_no_collective_of_the_others(tmp_path):
    assert run_ranks(waiting.a_rank_leaves_early, 3, tmp_path) == [2.0, 2.0, 1.0]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(('how', 'dies'), [('sync', 2), ('async', 2), ('async', 0)])
def test_the_death_of_a_rank_ends_a_save_and_every_later_meeting(tmp_path, how, dies):
    run_ranks(
        waiting.a_rank_dies, 3, tmp_path, expect_failure=True,
        how=how, dies=dies, folder=tmp_path,
    )  # fmt: skip
    results = [json.loads(path.read_text()) for path in tmp_path.glob('ranks-*/result_*.json')]
    assert len(results) == 2
    for found in results:
        for name, (seconds, message) in found.items():
            assert seconds < 15, (name, seconds)
            if name != 'shutdown':
                dead = rf'RankError: .*rank {dies} on \S+ \(pid \d+\)[^;]* (is|are) (dead|gone)'
                assert re.search(dead, message), (name, message)
