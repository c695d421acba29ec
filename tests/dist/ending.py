"""What ranks do in test_last_words.py and test_train_workers.py: they end, each in its own way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from argparse import Namespace
from pathlib import Path

import torch

from internvl_ds.config.tree import default_config, get_config
from internvl_ds.dist.process_group import init_distributed
from internvl_ds.dist.rendezvous import exchange, rank
from internvl_ds.errors import ConfigError
from internvl_ds.train.data import build_loaders, start_epoch
from internvl_ds.train.loop import run
from tests.harness.training import small_config


def alike(traceback: bool = False) -> None:
    """All have the same error of this package."""
    config = default_config()
    config.TRAIN.TRACEBACK = traceback
    init_distributed(config)
    exchange('begin', None, 30)
    raise ConfigError('DATA.BATCH_SIZE 3 is odd')


def one_fails(who: int) -> None:
    """One has an error; what the other sees is that it is gone."""
    exchange('begin', None, 30)
    if rank() == who:
        raise ValueError('a bad batch')
    torch.distributed.all_reduce(torch.ones(1))


def one_is_late() -> None:
    """Rank 0 gives up on rank 1, whose own error comes after that."""
    exchange('begin', None, 30)
    if rank() == 1:
        time.sleep(12)
        raise OSError('the share is gone')
    exchange('save', None, 2)


def one_is_killed() -> None:
    """It can say nothing."""
    exchange('begin', None, 30)
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))


def interrupted() -> None:
    """All ranks of a script that knows nothing of signals get Ctrl-C."""
    exchange('begin', None, 30)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)


def train(cfg: str, output: str, workers: int) -> None:
    """The training program's run, with so many workers."""
    opts = ['DATA.NUM_WORKERS', str(workers)]
    run(get_config(Namespace(cfg=cfg, output=output, opts=opts)))


def beside_a_child(folder: str, data: str, persistent: bool) -> list[int]:
    """Ends with a loader's worker under way, beside a child of its own that ends in order."""

    def child() -> None:
        def end(number: int, frame: object) -> None:
            Path(folder, f'ended in order {rank()}').touch()
            os._exit(0)

        signal.signal(signal.SIGTERM, end)
        Path(folder, f'began {rank()}').touch()
        time.sleep(60)

    multiprocessing.get_context('fork').Process(target=child, daemon=True).start()
    keys = {'DATA__NUM_WORKERS': 2, 'DATA__PERSISTENT_WORKERS': persistent}
    loader = build_loaders(small_config(Path(data), **keys), 0, 1).train
    assert loader is not None
    if persistent:
        list(loader)
    start_epoch(loader, 0, 0, 0)
    batches = iter(loader)
    next(batches)
    while not Path(folder, f'began {rank()}').exists():
        time.sleep(0.01)
    globals()['kept'] = batches
    return [worker.pid for worker in batches.workers]
