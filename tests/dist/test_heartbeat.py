"""Who is known to be dead, and who is named when ranks do not answer."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internvl_ds.dist.heartbeat import Liveness, listen
from tests.harness.ranks import ROOT, base_env

NAMES = [f'rank {rank} on host (pid {rank})' for rank in range(4)]
LIMITS = {'CONNECT_TIMEOUT': 3.0, 'DEAD_AFTER': 10.0, 'SILENT_AFTER': 1.0}
# A rank with a child of its own, such as the workers that load data are.
RANK = """
import json, os, sys, time
from internvl_ds.dist.heartbeat import Liveness, Offer
rank, names, offer, limits = json.loads(sys.argv[1])
liveness = Liveness(rank, names, Offer(*offer), None, limits)
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(120)
"""


@pytest.fixture
def ranks():
    """Rank 0, rank 1, and the processes of ranks 2 and 3."""
    listener, offer = listen()
    first = Liveness(0, NAMES, offer, listener, LIMITS)
    second = Liveness(1, NAMES, offer, None, LIMITS)
    others, children = [], []
    for rank in (2, 3):
        command = [sys.executable, '-c', RANK, json.dumps([rank, NAMES, offer, LIMITS])]
        others.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, env=base_env(), cwd=ROOT, text=True)
        )
        children.append(int(others[-1].stdout.readline()))
    yield first, second, *others
    for other, child in zip(others, children, strict=True):
        other.kill()
        other.wait()
        other.stdout.close()
        subprocess.run(['kill', '-9', str(child)], check=True)
    second.stop()
    first.stop()


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_rank_that_was_stopped_is_silent_and_one_that_was_killed_is_dead(ranks):
    first, second, stopped, killed = ranks
    assert [one.describe_silent() for one in (first, second)] == ['', '']
    stopped.send_signal(signal.SIGSTOP)
    status = Path(f'/proc/{stopped.pid}/stat')
    wait_until(lambda: status.read_text().rpartition(')')[2].split()[0] == 'T')
    for one in (first, second):
        said = 'rank 2 on host (pid 2) has given no sign of life for 1 s'
        assert one.describe_silent() == said
        assert one.dead() == []
    killed.kill()
    for one in (first, second):
        wait_until(lambda: one.dead() == [3])
        assert one.describe_silent() == (
            'rank 3 on host (pid 3) is dead (the process has ended or its host is cut off); ' + said
        )
    stopped.kill()
    for one in (first, second):
        wait_until(lambda: one.dead() == [3, 2])
    first.stop()
    wait_until(lambda: second.dead() == [3, 2, 0])


def test_who_does_not_know_the_token_is_no_rank(ranks):
    first = ranks[0]
    port = first._listener.getsockname()[1]
    for words in (b'hello wrong 2\n', b'dead 2\n', b'\xff\xfe\n', b'\n'):
        with socket.create_connection(('127.0.0.1', port), 3) as stranger:
            stranger.sendall(words)
            assert stranger.recv(100) == b''
    assert first.dead() == []
    assert first.describe_silent() == ''


def test_where_rank_0_cannot_be_reached_beside_the_store_a_rank_goes_on(caplog):
    listener, offer = listen()
    listener.close()
    alone = Liveness(1, NAMES, offer, None, LIMITS)
    assert 'rank 1 cannot connect to rank 0 beside the store (' in caplog.text
    assert (alone.dead(), alone.describe_silent()) == ([], '')
    alone.stop()
