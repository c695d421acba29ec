"""What ranks do in test_device_use.py: train, with all that is asked of a device noted."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d
from yacs.config import CfgNode

from internvl_ds import initialize
from internvl_ds.tools.selftest import program
from internvl_ds.tools.selftest.row import ABSENT, Row
from internvl_ds.tools.selftest.subject import bare_update
from internvl_ds.tools.selftest.traffic import Traffic, traffic_row
from internvl_ds.train import loop, validation
from internvl_ds.train.loop import run
from internvl_ds.train.model import build_model, input_dtype
from internvl_ds.train.optim import build_optimizer
from tests.harness.model import on_device
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
        The collectives in order, those that NCCL would not take, those of other threads, what
        forked children asked the accelerator, and the reads of the device by the host in each
        epoch and each evaluation.
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
    reads: dict[str, list[int]] = {}
    with Traffic(torch.device(accelerator.device_name())) as traffic:
        for owner, name in ((loop, 'train_one_epoch'), (validation, 'evaluate')):
            _count_reads(owner, name, traffic, reads)
        run(config, {'zero_optimization': {'stage': stage}})
    reads['bare update'] = [_reads_of_bare_update(config, stage)]
    asked = told.read_text() if told.exists() else ''
    collectives = [list(item) for item in traffic.collectives]
    # gloo's barrier is one of the host.
    faults = [fault for fault in traffic.faults if not fault.startswith('barrier ')]
    return {
        'order': collectives, 'faults': faults, 'strays': strays, 'asked': asked, 'reads': reads,
    }  # fmt: skip


def _reads_of_bare_update(config: CfgNode, stage: int) -> int:
    """How often the host reads the device in an update of the bare engine."""
    model = build_model(config)
    client = build_optimizer(config, model, 1e-3)
    engine, _ = initialize(config, model, client, {'zero_optimization': {'stage': stage}})
    x, y = on_device(torch.randn(4, 3, 16, 16).to(input_dtype(engine)), torch.arange(4) % 3)
    for _ in range(3):
        with Traffic(engine.device) as traffic:
            bare_update(engine, torch.nn.functional.cross_entropy(engine(x).float(), y))
    return traffic.reads


def try_all(output: str) -> list[list[str]]:
    """The self-test's rows but for its pace: a host that plays a device is slow."""
    program.pace_rows = lambda: Row('pace', ABSENT, '')  # type: ignore[assignment, return-value]
    rows = program.selftest(Path(output) / 'selftest', quick=False)
    rows.append(traffic_row((0, 3), 'bf16'))
    return [[row.name, row.verdict, row.found] for row in rows if row.name != 'a killed rank']


def _count_reads(owner: Any, name: str, traffic: Traffic, reads: dict[str, list[int]]) -> None:
    """Notes how often the host reads the device in each call of a function of the program."""
    function = getattr(owner, name)

    def counted(*args: Any, **more: Any) -> Any:
        before = traffic.reads
        result = function(*args, **more)
        reads.setdefault(name, []).append(traffic.reads - before)
        return result

    setattr(owner, name, counted)
