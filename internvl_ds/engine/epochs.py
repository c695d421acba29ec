"""Begins an epoch in a script's own loop: all randomness follows from its number."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from internvl_ds.config.tree import get_option
from internvl_ds.dist.rendezvous import rank


def seed_everything(seed: int) -> None:
    """Seeds Python's, numpy's and torch's global generators, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Makes torch take algorithms that give the same bits each time, in this process.

    It comes before the first use of a GPU. An operation that has no such algorithm raises
    RuntimeError, naming it, when it is used.
    """
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def seed_of(*place: int) -> int:
    """A seed below 2 ** 32 that follows from numbers of at least 0, whose order counts."""
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def start_epoch(config: CfgNode, loader: Any, epoch: int) -> None:
    """Begins an epoch, in place of ``loader.sampler.set_epoch(epoch)``: a resumed run draws alike.

    Order, augmentation in the loader's workers, mixup and dropout then depend on (SEED, epoch,
    rank) alone, and not on what was drawn before. `save_checkpoint` keeps the generators of the
    rank's process only: workers that live on between epochs have generators of their own, which are
    lost with them, and every other loader that is iterated between a load and the next epoch draws
    its workers' seed from the process's.

    Call it on every rank; it talks to no other.

    Args:
        config: SEED is read.
        loader: torch's DataLoader of the training images. Persistent workers of it are ended: the
            epoch's are new.
        epoch: counted from 0.
    """
    seed = seed_of(abs(int(get_option(config, 'SEED', 0))), epoch, rank())
    seed_everything(seed)
    if getattr(loader, 'generator', None) is not None:
        loader.generator.manual_seed(seed)
    set_epoch = getattr(loader.sampler, 'set_epoch', None)
    if set_epoch is not None:
        set_epoch(epoch)
    batches = getattr(loader, '_iterator', None)  # torch keeps it for persistent workers
    if batches is not None:
        batches._shutdown_workers()
        loader._iterator = None
