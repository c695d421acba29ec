"""Interfaces, the address of rank 0, and the tools that start ranks on several hosts."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from internvl_ds.dist import launchers
from internvl_ds.dist.network import addresses, interface_towards, own_addresses
from internvl_ds.errors import ConfigError
from internvl_ds.tools.doctor.probe_result import ProbeResult, fault, ok, warn

_STARTERS = ('deepspeed', 'torchrun', 'mpirun', 'srun', 'ssh', 'pdsh')
_VARIABLES = {'GLOO_SOCKET_IFNAME': 'gloo', 'NCCL_SOCKET_IFNAME': 'NCCL'}
_SHOWN = 4  # interfaces
_COPES = 'init_distributed copes with that'


def probe() -> list[ProbeResult]:
    """Interfaces, rank 0's address, variables of a launcher, and the starters."""
    return [_interfaces(), _rank_0(), _variables(), _starters()]


def probe_name() -> list[ProbeResult]:
    """The address of this host's name; a name server that is away makes it slow."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        reason = error.strerror or error
        return [warn('host name', f'{name} does not resolve ({reason}): {_COPES}')]
    loopback = f', a loopback address: {_COPES}' if address.startswith('127.') else ''
    return [ok('host name', f'{name} is {address}{loopback}')]


def _interfaces() -> ProbeResult:
    names = dict(socket.if_nameindex()).values()
    interfaces = [
        f'{name} {address} {"loopback" if address.startswith("127.") else _state(name)}'
        for name, address in addresses()
    ]
    more = f' and {len(interfaces) - _SHOWN} more' if len(interfaces) > _SHOWN else ''
    text = ', '.join(interfaces[:_SHOWN]) + more or 'none with an IPv4 address'
    for variable, backend in _VARIABLES.items():
        # NCCL's takes prefixes, lists and ^exclusions; each part is looked at by its plain name.
        value = os.environ.get(variable, '')
        parts = [part.lstrip('=') for part in value.split(',') if part and value[0] != '^']
        unknown = [part for part in parts if not any(n.startswith(part) for n in names)]
        if unknown:
            why = f'there is no interface {", ".join(unknown)}: {backend} can make no process group'
            advice = f'{why}. Unset it, or name one that is there'
            return fault('network', f'{text}; {variable} is {value!r}', advice)
    if not interfaces:
        return fault('network', text, 'not even ranks of one host can meet: ip link set lo up')
    return ok('network', text)


def _rank_0() -> ProbeResult:
    topic, others = 'rank 0', ', '.join(own_addresses())
    if master := os.environ.get('MASTER_ADDR'):
        interface = interface_towards(master)
        return ok(topic, f'MASTER_ADDR is {master}, by {interface or "loopback or no interface"}')
    if not others:
        return warn(topic, '127.0.0.1: this host has no other address', 'one host only')
    return ok(topic, f'127.0.0.1 on one host; towards others the first reached of {others}')


def _variables() -> ProbeResult:
    topic = 'launcher'
    try:
        launch = launchers.detect(os.environ)
    except ConfigError as error:
        return fault(topic, str(error), 'every start from this shell fails: unset them')
    if launch.by == launchers.SINGLE:
        return ok(topic, 'no variables of a launcher are set in this shell')
    advice = (
        'in a plain shell these variables are left over, and a run waits for the other ranks: '
        'unset RANK WORLD_SIZE LOCAL_RANK'
    )
    text = f'this process is rank {launch.rank} of {launch.world_size} by {launch.by}'
    return warn(topic, text, advice)


def _starters() -> ProbeResult:
    programs = [name for name in _STARTERS if shutil.which(name)]
    absent = ', '.join(name for name in _STARTERS if name not in programs)
    text = f'{", ".join(programs) or "none"} on PATH'
    return ok('starters', text + (f'; not there: {absent}' if absent else ''))


def _state(name: str) -> str:
    """The kernel's state; it says 'unknown' of virtual interfaces that carry traffic."""
    try:
        state = Path('/sys/class/net', name, 'operstate').read_text().strip()
    except OSError:
        return '?'
    return 'up' if state == 'unknown' else state
