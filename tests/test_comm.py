"""reduce_tensor and the named meetings, on 2 and 4 real ranks."""

import os
import re

import pytest
import torch

from internvl_ds import comm, reduce_tensor
from tests.ranks import RankFailed, run_ranks


@pytest.mark.ranks
@pytest.mark.parametrize('ranks', [2, 4])
def test_reduce_tensor_is_the_mean_and_leaves_its_input(tmp_path, ranks):
    mean = sum(range(ranks)) / ranks
    for rank, got in enumerate(run_ranks('tests.workers.talking:reduce', ranks, tmp_path)):
        assert got['mean'] == [mean, 1.0]
        assert got['input'] == [float(rank), 1.0]
        assert got['scalar'] == mean
        assert got['integer'] == mean
        assert got['bf16'] == 'torch.bfloat16'
        assert not got['shared']


@pytest.mark.ranks
def test_meetings_exchange_agree_and_pass_errors_on(tmp_path):
    for rank, got in enumerate(run_ranks('tests.workers.talking:meet', 2, tmp_path)):
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
    results = run_ranks('tests.workers.talking:missing', ranks, tmp_path)
    for got in results[:-1]:
        assert f'waited 2 s and rank {ranks - 1} did not come' in got['message']
    for got in results:
        assert got['later'] == list(range(ranks))


@pytest.mark.ranks
def test_a_meeting_ends_on_rank_0_when_all_have_read_what_it_holds(tmp_path):
    results = run_ranks('tests.workers.talking:rank_0_ends_at_once', 2, tmp_path, folder=tmp_path)
    assert results == [None, [0, 1]]


@pytest.mark.ranks
def test_rank_0_leaves_last(tmp_path):
    assert run_ranks('tests.workers.harness:leave_late', 2, tmp_path) == ['', 'x']


def test_alone_there_is_nothing_to_wait_for():
    value = torch.tensor([2.0])
    assert reduce_tensor(value).tolist() == [2.0]
    assert comm.exchange('x', {'a': 1}, 1) == [{'a': 1}]
    assert comm.agree('x', lambda: 5, 1) == 5
    assert comm.from_rank_0('x', lambda: 'y', 1) == 'y'
    assert (comm.rank(), comm.world_size()) == (0, 1)
    comm.shutdown()


@pytest.mark.ranks
def test_the_harness_shows_what_each_rank_printed_and_ends_the_others(tmp_path):
    with pytest.raises(RankFailed) as failure:
        run_ranks('tests.workers.harness:fail_on_rank_1', 2, tmp_path)
    text = str(failure.value)
    assert 'ValueError: on purpose' in text
    assert 'rank 0 waits' in text
    assert 'the others were ended' in text


@pytest.mark.ranks
def test_the_harness_ends_a_job_at_its_limit_with_all_its_children(tmp_path):
    with pytest.raises(RankFailed, match='ended after 12 s'):
        run_ranks('tests.workers.harness:hang', 2, tmp_path, timeout=12, folder=tmp_path)
    children = [int(p.read_text()) for p in tmp_path.glob('child_*')]
    for child in children:
        status = f'/proc/{child}/stat'
        assert not os.path.exists(status) or ') Z' in open(status).read()  # noqa: SIM115, PTH123


@pytest.mark.ranks
def test_gather_hands_rank_0_what_each_rank_brought(tmp_path):
    results = run_ranks('tests.workers.talking:gather_twice', 3, tmp_path)
    assert results[0] == [[{'rank': r, 'round': n} for r in range(3)] for n in range(2)]
    assert results[1] == results[2] == [None, None]


@pytest.mark.ranks
def test_threads_meet_while_the_main_thread_waits_in_another_meeting(tmp_path):
    for result in run_ranks('tests.workers.talking:meet_in_the_background', 2, tmp_path):
        assert result == ['threads of [0, 1]', 'main']


@pytest.mark.ranks
def test_threads_meet_after_the_process_group_is_gone(tmp_path):
    results = run_ranks(
        'tests.workers.talking:meet_after_the_group_is_gone', 2, tmp_path, timeout=30
    )
    assert results == [[0, 1], [0, 1]]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('stage', [1, 3])
def test_comm_timeout_bounds_the_collectives_of_deepspeed(tmp_path, stage):
    texts = run_ranks(
        'tests.workers.talking:wait_for_a_lost_rank', 2, tmp_path,
        timeout=120, expect_failure=True, stage=stage,
    )  # fmt: skip
    # gloo's words; torch's own default would have kept rank 0 waiting for 30 minutes
    assert re.search('Timed out waiting 5000ms', texts[0]), texts[0][-2000:]
