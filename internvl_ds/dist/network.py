"""This host's network: its addresses, the interface towards another host, and who is reached."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

import psutil

_VIRTUAL = ('lo', 'docker', 'virbr', 'veth', 'br-')
_OUTGOING = Path('/proc/sys/net/ipv4/ip_local_port_range')
_PRIVILEGED = 1024  # ports below need rights
_TRIES = 100


def own_addresses(interface: str = '') -> list[str]:
    """This host's IPv4 addresses, without those of loopback and bridges unless asked for."""
    return [
        address
        for name, address in addresses()
        if name == interface or (not interface and not name.startswith(_VIRTUAL))
    ]


def address_towards(host: str, family: int = socket.AF_UNSPEC) -> str | None:
    """The address by which this host reaches another; None where the other is not known."""
    try:
        family, *_, address = socket.getaddrinfo(host, 1, family, socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_towards(host: str) -> str | None:
    """The network interface by which this host reaches another, or itself by that address.

    None where the host is not known, or is reached over loopback.
    """
    source = address_towards(host, socket.AF_INET)
    name = next((name for name, address in addresses() if address == source), None)
    return None if name == 'lo' else name


def why_not_reached(address: str, port: int, limit: float) -> str | None:
    """Why no connection is accepted at an address within ``limit`` seconds; None if one is."""
    try:
        with socket.create_connection((address, port), timeout=limit):
            return None
    except OSError as error:
        return f'no connection to {address}:{port} ({error})'


def addresses() -> list[tuple[str, str]]:
    """(interface, IPv4 address) of this host, in the kernel's order."""
    every = [(name, a) for name, several in psutil.net_if_addrs().items() for a in several]
    return [(name, a.address) for name, a in every if a.family == socket.AF_INET]


def free_port() -> int:
    """A TCP port that was free on the loopback interface when asked.

    It is outside the range that the kernel gives to outgoing connections: a connection of another
    process could take one of those before the caller listens.
    """
    first = int(_OUTGOING.read_text().split()[0]) if _OUTGOING.exists() else 32_768
    below = range(max(_PRIVILEGED, first - 12_000), first)
    for port in random.SystemRandom().choices(below, k=_TRIES) if below else ():
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(('127.0.0.1', port))
            return port
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])
