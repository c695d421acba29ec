"""The host's addresses and interfaces, on the loopback interface and on what there is."""

import socket
from pathlib import Path

import pytest

from internvl_ds.dist import network
from internvl_ds.dist.network import (
    free_port,
    interface_towards,
    own_addresses,
    why_not_reached,
)


def test_loopback_is_named_only_when_asked_for():
    assert own_addresses('lo') == ['127.0.0.1']
    assert '127.0.0.1' not in own_addresses()
    assert own_addresses('nonesuch0') == []


def test_the_interface_towards_ones_own_address_is_the_one_that_has_it():
    for address in own_addresses():
        name = interface_towards(address)
        assert name is not None
        assert address in own_addresses(name)
    assert interface_towards('127.0.0.1') is None
    assert interface_towards('no-such-host.invalid') is None


def test_what_listens_is_reached():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
        assert 'no connection to' in why_not_reached('127.0.0.1', port, 3)
        listener.listen()
        assert why_not_reached('127.0.0.1', port, 3) is None


def test_a_free_port_is_none_that_the_kernel_gives_to_outgoing_connections():
    first, last = map(int, Path('/proc/sys/net/ipv4/ip_local_port_range').read_text().split())
    ports = [free_port() for _ in range(20)]
    assert not [port for port in ports if first <= port <= last]
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', ports[0]))


@pytest.mark.parametrize('first', [1, 1024, 1025])
def test_there_is_a_free_port_where_the_kernel_gives_nearly_all(monkeypatch, tmp_path, first):
    (outgoing := tmp_path / 'range').write_text(f'{first}\t65535\n')
    monkeypatch.setattr(network, '_OUTGOING', outgoing)
    assert free_port() >= 1024
