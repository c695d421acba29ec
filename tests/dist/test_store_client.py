"""Every call of the store ends in time and names rank 0, which stands still or is cut off."""

import json
import re
import subprocess
import sys
import threading
import time

import pytest

from internvl_ds.dist import store_client
from internvl_ds.dist.network import free_port
from internvl_ds.dist.store_client import StoreClient
from internvl_ds.errors import RankError
from tests.dist import waiting
from tests.harness import hosts
from tests.harness.ranks import ROOT, base_env, run_ranks

LIMIT = 6.0
# Those that tell the others something, and wait for nothing.
AT_ONCE = {'raise_request', 'part_from', 'shutdown'}


def require_in_time(found):
    assert len(found) > 25
    for name, (seconds, message) in found.items():
        assert seconds is not None, f'{name} hangs'
        assert seconds < LIMIT + 5, f'{name} took {seconds} s'
        if name not in AT_ONCE:
            assert re.search(r'RankError: .*rank 0 on \S+ \(pid \d+\)', message), (name, message)


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
def test_every_call_ends_while_rank_0_stands_still(tmp_path):
    _, found = run_ranks(
        waiting.rank_0_is_away, 2, tmp_path,
        limit=LIMIT, folder=tmp_path, how='stopped',
    )  # fmt: skip
    require_in_time(found)
    assert 'which holds the store, does not answer: waited 6 s' in found['making a group'][1]
    assert found['again'][0] < 1


@pytest.mark.ranks
@pytest.mark.slow
def test_every_call_ends_after_the_link_is_cut(tmp_path):
    if reason := hosts.why_not():
        pytest.skip(f'no hosts can be made here: {reason}')
    with hosts.Hosts(2, tmp_path) as two:
        port, ranks = str(free_port()), []
        (tmp_path / 'ranks-0').mkdir()
        for rank in range(2):
            env = base_env(
                RANK=str(rank), LOCAL_RANK='0', WORLD_SIZE='2', MASTER_ADDR='10.99.0.1',
                MASTER_PORT=port,
            )  # fmt: skip
            command = [sys.executable, '-m', 'tests.dist.waiting', str(LIMIT), str(tmp_path)]
            with (tmp_path / f'log_{rank}').open('wb') as log:
                ranks.append(
                    subprocess.Popen(
                        two.command(rank, command, ROOT), env=env, stdout=log, stderr=log,
                        stdin=subprocess.DEVNULL,
                    )
                )  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / 'ready').exists():
                assert time.monotonic() < deadline, (tmp_path / 'log_1').read_text()
                time.sleep(0.05)
            two.plug(1, False)
            (tmp_path / 'cut').touch()
            codes = [process.wait(90) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    assert codes == [0, 0], [(tmp_path / f'log_{r}').read_text() for r in range(2)]
    first, found = (json.loads((tmp_path / f'ranks-0/result_{r}.json').read_text()) for r in (0, 1))
    require_in_time(found)
    seconds, message = first['rank 0 waits']
    assert seconds < 15
    assert re.search(r'rank 1 on host1 \(pid \d+\) did not come and is dead', message)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_start_that_misses_a_rank_ends_at_its_limit_and_names_it(tmp_path):
    limit = 5
    results = run_ranks(waiting.ranks_that_miss_each_other, 3, tmp_path, limit=limit)
    stood_still = results[0].pop('rank 0 stands still')
    said = {name: text for found in results for name, (seconds, text) in found.items()}
    assert max(seconds for found in results for seconds, _ in found.values()) < limit + 5, results
    for text in (*said.values(), stood_still[1]):
        assert f'within {limit} s (COMM.INIT_TIMEOUT): ' in text
    assert f'waited {limit} s and rank 1, rank 2 did not come' in said.pop('others are missing')
    assert len(said) == 4
    for name, text in said.items():
        assert 'the store of rank 0 at ' in text, name
        refused = name in ('rank 0 is missing', 'no such host')
        assert ('no connection to' in text) == refused, (name, text)


def client(connect=dict, dead=lambda: ''):
    return StoreClient(connect, 'rank 0 on here', dead)


def test_calls_are_made_in_order_and_errors_are_passed_on():
    store = client()
    for number in range(3):
        store.post(lambda held, number=number: held.setdefault('list', []).append(number))
    assert store.call(lambda held: held['list'], 5) == [0, 1, 2]
    with pytest.raises(KeyError):
        store.call(lambda held: held['nothing'], 5)
    store.close(5)
    with pytest.raises(RankError, match='was closed'):
        store.call(dict, 5)


def test_a_call_ends_at_its_limit_or_when_the_holder_is_dead_and_so_does_every_later_one():
    hang, reasons = threading.Event(), []
    for dead, limit, said in (
        (lambda: '', 0.7, 'rank 0 on here does not answer: waited 0.7 s'),
        (lambda: ''.join(reasons), 60, 'it is dead'),
    ):
        store = client(dead=dead)
        threading.Timer(0.6, reasons.append, ['it is dead']).start()
        start = time.monotonic()
        with pytest.raises(RankError, match=said):
            store.call(lambda _: hang.wait(60), limit)
        assert time.monotonic() - start < 10
        with pytest.raises(RankError, match=said):
            store.call(dict, 60)
        reasons.clear()
    hang.set()


def test_a_connection_that_is_lost_says_why_without_the_stack():
    def reset(_):
        raise RuntimeError('Connection reset by peer\nframe #0: c10::Error')

    with pytest.raises(RankError, match=r'^rank 0 on here is gone: Connection reset by peer$'):
        client().call(reset, 5)


def test_what_torch_waits_for_is_ended_when_the_store_does_not_answer(monkeypatch):
    cut = threading.Event()
    monkeypatch.setattr(store_client, '_cut_connections', lambda port: cut.set())

    class Silent:
        def check(self, keys):
            cut.wait(30)

    def call_of_torch():
        with store_client.store_answers(client(Silent), 1, 0.5, lambda _: ''):
            assert cut.wait(20)
            raise RuntimeError('Connection reset by peer')

    with pytest.raises(RankError, match='does not answer'):
        call_of_torch()
