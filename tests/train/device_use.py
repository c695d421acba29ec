"""What ranks do in test_device_use.py: train, with all that is asked of a device noted."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from internvl_ds.tools.selftest.traffic import Traffic
from internvl_ds.train.loop import run
from tests.harness.training import small_config

# What CUDA cannot answer in a child that was forked.
QUESTIONS = ('device_count', 'is_available', 'current_device', 'current_device_name', 'set_device')
COLLECTIVES = (
    'all_gather', 'all_gather_into_tensor', 'all_reduce', 'all_to_all_single', 'barrier',
    'broadcast', 'reduce_scatter_tensor',
)  # fmt: skip


def train(data: str, output: str, stage: int) -> dict[str, Any]:
    """Trains two epochs with loaders' workers, an average, saves in the background and evaluation.

    Returns:
        The collectives in order, those that NCCL would not take, those of other threads, and what
        forked children asked the accelerator.
    """
    main, told = os.getpid(), Path(output) / 'asked'
    accelerator = get_accelerator()
    for name in QUESTIONS:
        answer = getattr(accelerator, name)

        def ask(*args: Any, name: str = name, answer: Any = answer) -> Any:
            if os.getpid() != main:
                told.write_text(name)
                raise RuntimeError(f'{name} in a forked child')
            return answer(*args)

        setattr(accelerator, name, ask)
    strays: list[str] = []
    for name in COLLECTIVES:
        collective = getattr(distributed_c10d, name)

        def note(*args: Any, name: str = name, collective: Any = collective, **more: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                strays.append(f'{name} in {threading.current_thread().name}')
            return collective(*args, **more)

        for owner in (distributed_c10d, torch.distributed):
            setattr(owner, name, note)
    config = small_config(
        Path(data), OUTPUT=output, TRAIN__EPOCHS=2, DATA__NUM_WORKERS=2, TRAIN__EMA__ENABLE=True,
        CHECKPOINT__ASYNC=True, AMP_OPT_LEVEL='O2', AMP_TYPE='bfloat16',
        MODEL__PRETRAINED=str(Path(data) / 'weights.pth'), MODEL__PRETRAINED_READERS='one',
    )  # fmt: skip
    with Traffic(torch.device('cpu')) as traffic:
        run(config, {'zero_optimization': {'stage': stage}})
    asked = told.read_text() if told.exists() else ''
    collectives = [list(item) for item in traffic.collectives]
    return {'order': collectives, 'faults': traffic.faults, 'strays': strays, 'asked': asked}
