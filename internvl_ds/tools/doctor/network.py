"""Interfaces, the address that rank 0 would have, and what is there to start several hosts with."""

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
_CHOSEN = {'GLOO_SOCKET_IFNAME': 'gloo', 'NCCL_SOCKET_IFNAME': 'NCCL'}
_SHOWN = 4  # interfaces
_COPES = 'init_distributed copes with that'


def probe() -> list[ProbeResult]:
    """Interfaces, rank 0's address, variables of a launcher, and the starters."""
    return [_interfaces(), _rank_0(), _variables(), _starters()]


def probe_name() -> list[ProbeResult]:
    """What this host's name resolves to; asking may take long where a name server is away."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        found = f'{name} does not resolve ({error.strerror or error}): {_COPES}'
        return [warn('host name', found)]
    if address.startswith('127.'):
        return [ok('host name', f'{name} is {address}, a loopback address: {_COPES}')]
    return [ok('host name', f'{name} is {address}')]


def _interfaces() -> ProbeResult:
    shown, names = [], dict(socket.if_nameindex()).values()
    for name, address in addresses():
        state = 'loopback' if address.startswith('127.') else _state(name)
        shown.append(f'{name} {address} {state}')
    more = f' and {len(shown) - _SHOWN} more' if len(shown) > _SHOWN else ''
    found = ', '.join(shown[:_SHOWN]) + more or 'none with an IPv4 address'
    for variable, backend in _CHOSEN.items():
        # NCCL's takes prefixes, lists and ^exclusions; each part is looked at by its plain name.
        chosen = os.environ.get(variable, '')
        wanted = [part.lstrip('=') for part in chosen.split(',') if part and chosen[0] != '^']
        missing = [part for part in wanted if not any(n.startswith(part) for n in names)]
        if missing:
            why = f'there is no interface {", ".join(missing)}: {backend} can make no process group'
            advice = f'{why}. Unset it, or name one that is there'
            return fault('network', f'{found}; {variable} is {chosen!r}', advice)
    if not shown:
        return fault('network', found, 'not even ranks of one host can meet: ip link set lo up')
    return ok('network', found)


def _rank_0() -> ProbeResult:
    topic, own = 'rank 0', own_addresses()
    given = os.environ.get('MASTER_ADDR')
    if given:
        interface = interface_towards(given)
        return ok(topic, f'MASTER_ADDR is {given}, by {interface or "loopback or no interface"}')
    if not own:
        return warn(topic, '127.0.0.1: this host has no other address', 'one host only')
    return ok(topic, f'127.0.0.1 on one host; towards others the first reached of {", ".join(own)}')


def _variables() -> ProbeResult:
    topic = 'launcher'
    try:
        launch = launchers.detect(os.environ)
    except ConfigError as error:
        return fault(topic, str(error), 'every start from this shell fails: unset them')
    if launch.by == launchers.SINGLE:
        return ok(topic, 'no variables of a launcher are set in this shell')
    return warn(
        topic,
        f'this process is rank {launch.rank} of {launch.world_size} by {launch.by}',
        'in a plain shell these variables are left over, and a run waits for the other ranks: '
        'unset RANK WORLD_SIZE LOCAL_RANK',
    )


def _starters() -> ProbeResult:
    there = [name for name in _STARTERS if shutil.which(name)]
    missing = [name for name in _STARTERS if name not in there]
    found = f'{", ".join(there) or "none"} on PATH'
    return ok('starters', found + (f'; not there: {", ".join(missing)}' if missing else ''))


def _state(name: str) -> str:
    """The kernel's word; 'unknown' is what it says of virtual ones that carry traffic."""
    try:
        state = Path('/sys/class/net', name, 'operstate').read_text().strip()
    except OSError:
        return '?'
    return 'up' if state == 'unknown' else state
