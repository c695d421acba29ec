"""Averages over ranks, limits and the end of the process group, on real ranks."""

import os
import re

import pytest
import torch

from internvl_ds import reduce_tensor
from internvl_ds.dist import process_group as comm
from internvl_ds.dist.reduce import reduce_tensors
from tests.dist import end_at_limit as harness
from tests.dist import talking
from tests.harness.ranks import RankFailed, run_ranks


@pytest.mark.ranks
@pytest.mark.parametrize('ranks', [2, 4])
def test_reduce_tensor_is_the_mean_and_leaves_its_input(tmp_path, ranks):
    mean = sum(range(ranks)) / ranks
    for rank, got in enumerate(run_ranks(talking.reduce, ranks, tmp_path)):
        assert got['mean'] == [mean, 1.0]
        assert got['several'] == [
            ['torch.float32', [mean, 1.0]],
            ['torch.float32', [[mean, 3.0]]],
            ['torch.bfloat16', [mean, mean]],
        ]
        assert got['input'] == [float(rank), 1.0]
        assert got['scalar'] == mean
        assert got['integer'] == mean
        assert got['bf16'] == 'torch.bfloat16'
        assert not got['shared']


@pytest.mark.first
@pytest.mark.ranks
def test_rank_0_leaves_last(tmp_path):
    assert run_ranks(harness.leave_late, 2, tmp_path) == ['', 'x']


@pytest.mark.ranks
def test_the_harness_shows_what_each_rank_printed_and_ends_the_others(tmp_path):
    with pytest.raises(RankFailed) as failure:
        run_ranks(harness.fail_on_rank_1, 2, tmp_path, grace=8)
    text = str(failure.value)
    assert 'ValueError: on purpose' in text
    assert 'rank 0 waits' in text
    assert 'the others were ended' in text


@pytest.mark.ranks
def test_the_harness_ends_a_job_at_its_limit_with_all_its_children(tmp_path):
    with pytest.raises(RankFailed, match='ended after 12 s'):
        run_ranks(harness.hang, 2, tmp_path, timeout=12, folder=tmp_path)
    children = [int(p.read_text()) for p in tmp_path.glob('child_*')]
    for child in children:
        status = f'/proc/{child}/stat'
        assert not os.path.exists(status) or ') Z' in open(status).read()  # noqa: SIM115, PTH123


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('stage', [1, 3])
def test_comm_timeout_bounds_the_collectives_of_deepspeed(tmp_path, stage):
    texts = run_ranks(
        talking.wait_for_a_lost_rank, 2, tmp_path,
        timeout=120, expect_failure=True, grace=1, stage=stage,
    )  # fmt: skip
    # gloo's words; torch's own default would have kept rank 0 waiting for 30 minutes
    assert re.search('Timed out waiting 5000ms', texts[0]), texts[0][-2000:]


@pytest.mark.parametrize(('interface', 'nccl'), [('', None), ('ib0', 'ib0')])
def test_nccl_finds_its_interfaces_but_for_comm_interface(monkeypatch, interface, nccl):
    for key in ('MASTER_ADDR', 'MASTER_PORT', 'GLOO_SOCKET_IFNAME', 'NCCL_SOCKET_IFNAME'):
        monkeypatch.setenv(key, '')  # to be as it was afterwards
        monkeypatch.delenv(key)
    monkeypatch.setattr(comm, 'interface_towards', lambda address: 'eth9')
    comm._set_master('10.0.0.1', 1234, interface)
    assert os.environ['GLOO_SOCKET_IFNAME'] == (interface or 'eth9')
    assert os.environ.get('NCCL_SOCKET_IFNAME') == nccl


def test_alone_an_average_is_a_copy():
    value = torch.tensor([2.0])
    assert reduce_tensor(value).tolist() == [2.0]
    assert reduce_tensor(value) is not value
    assert reduce_tensors([]) == []
    comm.shutdown()
