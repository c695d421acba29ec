"""What ranks do in test_preemption.py: pass boundaries while some of them are signalled."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import torch

from internvl_ds.config.tree import default_config
from internvl_ds.dist import preemption
from internvl_ds.dist.preemption import SAVE, STOP, Preemption
from internvl_ds.dist.rendezvous import rank, world_size


def boundaries(seed: int, trials: int, count: int) -> list[list[tuple[int, str]]]:
    """Loops of ``count`` boundaries; in each some ranks signal themselves, at different moments."""
    preemption._INTERVAL = 0.02
    common, own = random.Random(seed), random.Random(seed * 100 + rank())
    told = []
    for _ in range(trials):
        signalled = common.sample(range(world_size()), common.randint(0, world_size()))
        when = own.randint(0, count + 1) if rank() in signalled else -1
        actions = []
        with Preemption(default_config()) as watch:
            for index in range(count):
                time.sleep(own.uniform(0, 0.01))
                if index == when:
                    os.kill(os.getpid(), own.choice([signal.SIGTERM, signal.SIGUSR1]))
                torch.distributed.barrier()  # as an update's collectives do
                action = watch.reached()
                if action is not None:
                    actions.append((index, action))
                if action == STOP:
                    break
        told.append(actions)
    return told


def minutes(count: int) -> dict[str, Any]:
    """A loop in which a save is due every 0.2 s by rank 0's clock."""
    preemption._INTERVAL = 0.02
    config = default_config()
    config.TRAIN.SAVE_MINUTES = 0.2 / 60
    before = signal.getsignal(signal.SIGTERM)
    saves = []
    with Preemption(config) as watch:
        for index in range(count):
            time.sleep(0.01 * (1 + rank()))
            torch.distributed.barrier()
            action = watch.reached()
            if action is not None:
                saves.append((index, action))
    return {'saves': saves, 'restored': signal.getsignal(signal.SIGTERM) is before, 'save': SAVE}
