"""The host's addresses and interfaces, on the loopback interface and on what there is."""

import socket

from internvl_ds.dist.network import interface_towards, own_addresses, why_not_reached


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
