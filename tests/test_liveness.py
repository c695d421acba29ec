"""Who is named when ranks stop to give signs of life."""

import datetime
import socket

import torch.distributed as dist

from internvl_ds import liveness
from tests.ranks import free_port


def test_a_rank_that_stops_is_named_and_one_that_goes_on_is_not(monkeypatch):
    monkeypatch.setattr(liveness, '_PERIOD', 0.05)
    monkeypatch.setattr(liveness, '_PATIENCE', 0.5)
    port = free_port()
    limit = datetime.timedelta(seconds=10)
    server = dist.TCPStore('127.0.0.1', port, is_master=True, wait_for_workers=False, timeout=limit)
    ranks = [liveness.Liveness(server.clone(), rank, 3) for rank in range(3)]
    assert ranks[0].describe_silent() == ''
    ranks[2].stop()
    said = ranks[0].describe_silent()
    assert said.startswith(f'rank 2 on {socket.gethostname()} (pid ')
    assert said.endswith('has given no sign of life for 0.5 s')
    ranks[1].stop()
    assert 'rank 1 on ' in ranks[0].describe_silent()
    assert 'have given no sign of life' in ranks[0].describe_silent()
    ranks[0].stop()
