"""Programs that a real launcher starts: `python -m tests.dist.launched WHAT FOLDER`."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

import torch

from internvl_ds import NativeScalerWithGradNormCount
from internvl_ds.dist.process_group import init_distributed, leave
from internvl_ds.dist.reduce import reduce_tensor
from internvl_ds.dist.rendezvous import exchange, rank, world_size
from tests.engine.stepping import make_engine, train_step


def train(folder: Path) -> None:
    """Three updates at stage 2; each rank writes what it was told and the norms that it saw."""
    engine, optimizer = make_engine(2, 'fp32')
    scaler = NativeScalerWithGradNormCount()
    norms = [float(train_step(engine, optimizer, scaler, step)[0]) for step in range(3)]
    told = {k: os.environ[k] for k in ('LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}
    means = [reduce_tensor(torch.tensor(value)) for value in (rank(), 0.5)]
    report = {'norms': norms, 'size': world_size(), 'means': [float(v) for v in means]}
    (folder / f'{rank()}.json').write_text(json.dumps({**told, **report}))


def main() -> None:
    """Does what the first argument names."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    logging.getLogger('internvl_ds').setLevel(logging.INFO)
    init_distributed()
    if what == 'train':
        train(folder)
    elif what == 'fail':  # one rank fails; the others would wait for it for long
        exchange('begin', None, 30)
        if rank() == 1:
            raise ValueError('a bad batch')
        time.sleep(120)
    leave()


if __name__ == '__main__':
    main()
