"""This host's network: its addresses, the interface towards another host, and who is reached."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915
_VIRTUAL = ('lo', 'docker', 'virbr', 'veth', 'br-')


def own_addresses(interface: str = '') -> list[str]:
    """This host's IPv4 addresses, without those of loopback and bridges unless asked for."""
    return [
        address
        for name, address in addresses()
        if name == interface or (not interface and not name.startswith(_VIRTUAL))
    ]


def interface_towards(host: str) -> str | None:
    """The network interface by which this host reaches another, or itself by that address.

    Returns:
        None where the host is not known, or is reached over loopback.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 1))  # a datagram socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    name = next((name for name, address in addresses() if address == own), None)
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
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack('256s', name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            found.append((name, socket.inet_ntoa(answer[20:24])))
    return found
