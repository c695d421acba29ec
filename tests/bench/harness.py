"""Contenders measured side by side, again and again, in random order.

One after the other they would meet different weather: disks and neighbours change by the minute.
Samples of one round are pairs; `tests.bench.figures` compares them.
"""

from __future__ import annotations

import gc
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed

ROUNDS = 9
_WARM_UPS = 1


def remove_tags(output: Path) -> None:
    """Removes what was saved in a directory, and not its lock: a run keeps to its directory."""
    for path in output.glob('[!.]*'):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _nothing() -> None:
    pass


class Contender(NamedTuple):
    """One way of doing something.

    Attributes:
        run: does it. The whole call is timed; or it returns name -> seconds of parts that it timed
            itself, which are then sampled as ``contender: part`` instead.
        prepare: undoes what the last sample left, untimed.
    """

    run: Callable[[], Mapping[str, float] | None]
    prepare: Callable[[], object] = _nothing


def measure(
    contenders: Mapping[str, Contender], rounds: int = ROUNDS, seed: int = 0
) -> dict[str, list[float]]:
    """Samples every contender once a round. Every rank must call it, with the same arguments.

    A first round in the order given is not counted: it fills caches and buffers.

    Args:
        contenders: name -> contender.
        rounds: how many are counted.
        seed: of the order, the same on all ranks.

    Returns:
        Name -> seconds of each round, in order; of the slowest rank.
    """
    samples: dict[str, list[float]] = defaultdict(list)
    orders = random.Random(seed)
    gc.collect()
    gc.freeze()  # a collection before each sample goes through what the samples made, and no more
    for number in range(-_WARM_UPS, rounds):
        names = list(contenders)
        if number >= 0:
            orders.shuffle(names)
        for name in names:
            parts = _sample(name, contenders[name])
            if number >= 0:
                for part, seconds in parts.items():
                    samples[part].append(seconds)
    gc.unfreeze()
    return {name: samples[name] for name in sorted(samples)}


def barrier() -> None:
    """Waits for all ranks, where there are any."""
    if distributed.is_initialized():
        distributed.barrier()


def _sample(name: str, contender: Contender) -> dict[str, float]:
    contender.prepare()
    gc.collect()
    barrier()
    start = time.perf_counter()
    parts = contender.run()
    whole = time.perf_counter() - start
    barrier()
    if parts is None:
        return {name: _slowest(whole)}
    return {f'{name}: {part}': _slowest(parts[part]) for part in sorted(parts)}


def _slowest(seconds: float) -> float:
    if not distributed.is_initialized():
        return seconds
    device = get_accelerator().current_device_name()
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
    return float(slowest)
