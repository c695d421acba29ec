"""Times updates of the real training loop: images per second and peak memory, in bench.json."""

from __future__ import annotations

import json
import logging
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from internvl_ds.dist.rendezvous import exchange, rank, world_size
from internvl_ds.files import write_text
from internvl_ds.train.optim import accumulation_steps
from internvl_ds.train.reporting.progress import memory_mib

BENCH_FILE = 'bench.json'

_CGROUP_LIMITS = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')


class TimeTaken(Exception):
    """Every rank has passed the last update that was to be timed."""


class Stopwatch:
    """Takes the time of BENCH.UPDATES updates after BENCH.WARMUP others.

    An update lasts from the end of the one before: reading data, all micro-batches, the step, and
    what the loop logs. The device is waited for at these ends only.
    """

    def __init__(self, config: CfgNode) -> None:
        """Records the process's memory so far; make it before the model.

        Args:
            config: BENCH is read.
        """
        self._warmup, self._updates = config.BENCH.WARMUP, config.BENCH.UPDATES
        self._baseline = _peak_bytes()
        self._last = 0.0
        self._done = 0
        self._laps: list[tuple[int, float]] = []

    def start(self) -> None:
        """The first update begins."""
        self._last = time.perf_counter()

    def lap(self, images: int) -> None:
        """Counts an update. Collective: every rank calls it after every one.

        Args:
            images: that it was of, over all ranks.

        Raises:
            TimeTaken: after the last one.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._done += 1
        if self._done > self._warmup:
            self._laps.append((images, now - self._last))
        self._last = now
        if len(self._laps) == self._updates:
            raise TimeTaken

    def report(self, config: CfgNode, device: torch.device, logger: logging.Logger) -> float:
        """Writes OUTPUT/bench.json. Collective: every rank calls it.

        Args:
            config: of the run: OUTPUT, the batch settings and CHECKPOINT.RENDEZVOUS_TIMEOUT are
                read.
            device: of this rank.
            logger: told the result.

        Returns:
            Images per second over all ranks: the median over updates.
        """
        mine = {
            'laps': self._laps,
            'peak': _peak_bytes(),
            'baseline': self._baseline,
            'host': socket.gethostname(),
            **_device(device),
        }
        ranks = exchange('bench', mine, config.CHECKPOINT.RENDEZVOUS_TIMEOUT)
        micro, group = config.DATA.BATCH_SIZE, accumulation_steps(config)
        record = {
            **summarize(ranks), 'warmup': self._warmup, 'micro_batch': micro,
            'accumulation': group, 'global_batch': micro * group * world_size(),
        }  # fmt: skip
        if rank() == 0:
            write_text(Path(config.OUTPUT) / BENCH_FILE, json.dumps(record, indent=2) + '\n')
            low, high = record['images_per_s_range']
            speed = f'{record["images_per_s"]:.1f} img/s ({low:.1f} to {high:.1f})'
            peak = f'peak memory {record["peak_bytes"] / 2**20:.0f} MiB on a rank'
            logger.info(f'{record["updates"]} updates: {speed}, {peak}')
        return float(record['images_per_s'])


def summarize(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all ranks as one record. Pure.

    Args:
        ranks: of each one ``laps`` (images of all ranks and seconds, for each update), ``peak``,
            ``baseline``, ``host_bytes`` and ``device_bytes`` (bytes; None for a device of the
            host's memory), ``device`` and ``host``.

    Returns:
        For bench.json. An update takes as long as on its slowest rank; memory is that of the rank
        with the highest peak; ``device_bytes`` and ``host_bytes`` are what the least lucky rank may
        have, where ranks of one host share its memory evenly.
    """
    hosts = [r['host'] for r in ranks]
    updates = list(zip(*(r['laps'] for r in ranks), strict=True))
    seconds = [max(lasted for _, lasted in laps) for laps in updates]
    speeds = [laps[0][0] / lasted for laps, lasted in zip(updates, seconds, strict=True)]
    largest = max(ranks, key=lambda r: r['peak'])
    host_bytes = min(r['host_bytes'] // hosts.count(r['host']) for r in ranks)
    device_bytes = [r['device_bytes'] for r in ranks if r['device_bytes'] is not None]
    return {
        'images_per_s': statistics.median(speeds),
        'images_per_s_range': [min(speeds), max(speeds)],
        'seconds_per_update': statistics.median(seconds),
        'updates': len(seconds),
        'peak_bytes': largest['peak'],
        'baseline_bytes': largest['baseline'],
        'ranks': len(ranks),
        'device': ranks[0]['device'],
        'device_bytes': min(device_bytes, default=host_bytes),
        'host_bytes': host_bytes,
    }


def _peak_bytes() -> int:
    return int(memory_mib() * 2**20)


def _device(device: torch.device) -> dict[str, Any]:
    host_bytes = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    for path in map(Path, _CGROUP_LIMITS):
        text = path.read_text().strip() if path.is_file() else ''
        if text.isdigit():
            host_bytes = min(host_bytes, int(text))
    if device.type != 'cuda':
        return {'device': device.type, 'device_bytes': None, 'host_bytes': host_bytes}
    gpu = torch.cuda.get_device_properties(device)
    return {'device': gpu.name, 'device_bytes': gpu.total_memory, 'host_bytes': host_bytes}
