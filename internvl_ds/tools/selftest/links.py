"""The rates of an all-reduce and of the way from each rank to the next."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from internvl_ds.dist.rendezvous import exchange, rank, world_size
from internvl_ds.tools.selftest.row import ABSENT, OK, SLOW, WRONG, Row
from internvl_ds.tools.selftest.subject import LIMIT

_ELEMENTS = 1 << 22  # 16 MiB of float32
_TRIES = 5
# bytes/s: less than gigabit Ethernet gives
_LEAST = 0.1e9
# A link this many times slower than the middle one holds up all ranks.
_FACTOR = 4.0


def links_row() -> Row:
    """Sends 16 MiB about. Collective: every rank calls it."""
    name, ranks = 'links', world_size()
    if ranks == 1:
        return Row(name, ABSENT, 'one rank has no link')
    device = torch.device(get_accelerator().current_device_name())
    data = torch.full((_ELEMENTS,), float(rank() + 1), device=device)
    total = data.clone()
    dist.all_reduce(total)
    wanted = float(ranks * (ranks + 1) // 2)  # below 2**24 where float32 has all integers
    wrong = not bool((total == wanted).all())
    reduced = min(seconds_of(lambda: dist.all_reduce(total)) for _ in range(_TRIES))
    came = min(_pass_on(data) for _ in range(_TRIES))
    wrong |= not bool((data == float((rank() - _TRIES) % ranks + 1)).all())
    rates = [4 * _ELEMENTS / seconds for seconds in exchange('selftest links', came, LIMIT)]
    middle = statistics.median(rates)
    slow = [r for r, rate in enumerate(rates) if rate < max(_LEAST, middle / _FACTOR)]
    found = (
        f'all-reduce of 17 MB {4e-9 * _ELEMENTS / reduced:.2f} GB/s; from rank to rank '
        f'{middle / 1e9:.2f} GB/s, the slowest {min(rates) / 1e9:.2f}'
    )
    if wrong:
        return Row(name, WRONG, f'rank {rank()} got other numbers than were sent')
    listed = ', '.join(f'{(r - 1) % ranks} to {r} {rates[r] / 1e9:.3f} GB/s' for r in slow[:8])
    least = f'{max(_LEAST, middle / _FACTOR) / 1e9:.2f} GB/s'
    found += f'; slow, below {least}: rank {listed}' if slow else ''
    figures = {'all_reduce': 4 * _ELEMENTS / reduced, 'median': middle, 'slowest': min(rates)}
    return Row(name, SLOW if slow else OK, found, figures)


def _pass_on(data: torch.Tensor) -> float:
    """Sends the data to the next rank; the seconds in which that of the one before came.

    Even ranks send first, so that two neighbours never both wait.
    """
    own, ranks = rank(), world_size()
    came = torch.empty_like(data)
    dist.barrier()

    def receive() -> float:
        return seconds_of(lambda: dist.recv(came, src=(own - 1) % ranks))

    if own % 2 == 0:
        dist.send(data, dst=(own + 1) % ranks)
        seconds = receive()
    else:
        seconds = receive()
        dist.send(data, dst=(own + 1) % ranks)
    data.copy_(came)
    return seconds


def seconds_of(action: Callable[[], Any], count: int = 1) -> float:
    """The seconds that so many calls take, with all that they start on the device."""
    synchronize = get_accelerator().synchronize
    synchronize()
    start = time.monotonic()
    for _ in range(count):
        action()
    synchronize()
    return time.monotonic() - start
