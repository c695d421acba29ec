"""doctor: interfaces, rank 0's address, left-over variables of launchers."""

from __future__ import annotations

import socket

import pytest

from internvl_ds.dist.network import own_addresses
from internvl_ds.tools.doctor import network
from internvl_ds.tools.doctor.probe_result import ERROR, OK, WARNING

LEFT_OVER = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'GLOO_SOCKET_IFNAME')


@pytest.fixture
def found(monkeypatch):
    """Looks with these variables, and without those that a launcher sets."""
    for name in LEFT_OVER:
        monkeypatch.delenv(name, raising=False)

    def look(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return {finding.topic: finding for finding in network.probe()}

    return look


def test_a_plain_shell(found):
    findings = found()
    assert 'lo 127.0.0.1 loopback' in findings['network'].found
    assert findings['launcher'].verdict == OK
    for address in own_addresses():
        assert address in findings['rank 0'].found


def test_an_interface_that_is_not_there_bites(found):
    finding = found(GLOO_SOCKET_IFNAME='nonesuch0')['network']
    assert finding.verdict == ERROR
    assert 'there is no interface nonesuch0' in finding.advice
    assert found(GLOO_SOCKET_IFNAME='lo')['network'].verdict == OK


def test_left_over_variables_of_a_launcher(found):
    finding = found(RANK='1', WORLD_SIZE='4', LOCAL_RANK='1')['launcher']
    assert finding.verdict == WARNING
    assert 'rank 1 of 4 by deepspeed or torchrun' in finding.found


def test_incomplete_variables_bite(found):
    finding = found(RANK='1', WORLD_SIZE='4')['launcher']
    assert finding.verdict == ERROR
    assert 'LOCAL_RANK is None in the environment' in finding.found


def test_a_given_address(found):
    assert 'MASTER_ADDR is 127.0.0.1' in found(MASTER_ADDR='127.0.0.1')['rank 0'].found


def test_the_name_of_this_host(monkeypatch):
    monkeypatch.setattr(socket, 'gethostname', lambda: 'localhost')
    (finding,) = network.probe_name()
    assert finding.verdict == OK
    assert 'localhost is 127.0.0.1, a loopback address: init_distributed copes' in finding.found
    monkeypatch.setattr(socket, 'gethostname', lambda: 'no.such.host.invalid')
    assert network.probe_name()[0].verdict == WARNING
