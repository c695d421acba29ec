"""How many of a host's cores a rank computes on, where several share them."""

from __future__ import annotations

import os
import socket
import zlib

import torch
from yacs.config import CfgNode

from internvl_ds.dist.rendezvous import exchange
from internvl_ds.errors import ConfigError, few


def share_cores(config: CfgNode) -> None:
    """Divides cores between ranks that share them; those bound to cores of their own keep these.

    Collective: every rank calls it, with its data opened.

    Raises:
        ConfigError: where the data of ranks have given MODEL.NUM_CLASSES 0 different values.
    """
    cores = sorted(os.sched_getaffinity(0))
    own = [socket.gethostname(), zlib.crc32(repr(cores).encode())]
    mine = [*own, config.MODEL.NUM_CLASSES]
    theirs = exchange('hosts', mine, config.CHECKPOINT.IO_TIMEOUT)  # one may list files for longer
    counts = [each[2] for each in theirs]
    if others := [r for r, count in enumerate(counts) if count != counts[0]]:
        raise ConfigError(
            f'the images that ranks {few(others)} find have {few([counts[r] for r in others])} '
            f'classes, and those of rank 0 {counts[0]}: set MODEL.NUM_CLASSES'
        )
    sharing = [each[:2] for each in theirs].count(own)
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, len(cores) // sharing))
