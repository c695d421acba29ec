"""What ranks do in test_plan_measured.py: train a little, and see what the process allocates."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from yacs.config import CfgNode

from internvl_ds import NativeScalerWithGradNormCount, initialize, save_checkpoint
from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.copying import snapshot
from internvl_ds.config.tree import default_config, merge_opts
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.train.model import build_model, input_dtype
from internvl_ds.train.objective.criterion import build_criterion
from internvl_ds.train.objective.distill import Teacher, build_teacher
from internvl_ds.train.optim import build_optimizer
from tests.harness.model import on_device

_CHANNELS = 3


class _Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``; its fields are size_t."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            'arena', 'ordblks', 'smblks', 'hblks', 'hblkhd',
            'usmblks', 'fsmblks', 'uordblks', 'fordblks', 'keepcost',
        )
    ]  # fmt: skip


_libc = ctypes.CDLL('libc.so.6')
_libc.mallinfo2.restype = _Mallinfo2


def allocated() -> int:
    """Bytes that this process has allocated and not freed, over all threads and arenas."""
    info = _libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


class LockedMemory:
    """Stands for page-locked memory, of which torch takes the next power of two."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, size: int) -> torch.Tensor:
        if size:
            self.bytes += 2 ** math.ceil(math.log2(size))
        return torch.empty(size, dtype=torch.uint8)


class Peak(TorchDispatchMode):
    """The most that was allocated after any operation inside it, autograd's included."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, allocated())
        return result


def make_config(opts: list[str]) -> CfgNode:
    """The default tree with KEY VALUE pairs."""
    config = default_config()
    merge_opts(config, opts)
    config.freeze()
    return config


def measure(cases: list[list[Any]]) -> list[dict[str, int]]:
    """Trains two updates of each case, a list of KEY VALUE pairs and a ds_config.

    Returns:
        Bytes that this rank allocates: ``states`` between two updates; beyond them ``forward``,
        when the first micro-batch's loss is there, ``backward``, the most in forward and backward,
        and ``step``, the most in the update; where OUTPUT is set ``tag``, the bytes of a checkpoint
        of all ranks, and ``locked``, what this rank's copy for a background save would take of
        page-locked memory.
    """
    torch.manual_seed(0)
    return [_measure(make_config(opts), ds_config) for opts, ds_config in cases]


def _measure(config: CfgNode, ds_config: dict[str, Any]) -> dict[str, int]:
    gc.collect()
    before = allocated()
    model = build_model(config)
    engine, optimizer = initialize(config, model, build_optimizer(config, model, 1e-3), ds_config)
    ema = ShardedEma(engine) if config.TRAIN.EMA.ENABLE else None
    scaler = NativeScalerWithGradNormCount()
    loss_of = build_criterion(config, soft_targets=False)
    if (plain := build_teacher(config, logging.getLogger())) is not None:
        teacher = Teacher(config, plain, engine)
    else:
        teacher = None

    def criterion(logits: Any, labels: Any, images: Any) -> Any:
        loss = loss_of(logits, labels)
        return loss if teacher is None else teacher.joined(loss, logits, images)

    steps = engine.gradient_accumulation_steps()
    for micro in range(steps):  # makes the optimizer's state, and stage 3's order of modules
        _micro_batch(config, engine, optimizer, scaler, criterion, micro + 1 == steps)
    if ema is not None:
        ema.update()
    gc.collect()
    states = allocated()
    backward, update = Peak(), Peak()
    engine.step = _apart(engine.step, backward, update)
    forwards = [
        _micro_batch(config, engine, optimizer, scaler, criterion, micro + 1 == steps, backward)
        for micro in range(steps)
    ]
    found = {
        'states': states - before,
        'forward': forwards[0] - states,
        'backward': backward.bytes - states,
        'step': update.bytes - states,
    }
    if config.OUTPUT:
        tag = save_checkpoint(
            config, 0, engine, 0.0, optimizer, None, scaler, logging.getLogger(), model_ema=ema
        )
        found['tag'] = sum(path.stat().st_size for path in Path(tag).iterdir())
        config.defrost()
        config.CHECKPOINT.ASYNC = True
        with mock.patch.object(snapshot, '_host_buffer', taken := LockedMemory()):
            save_checkpoint(
                config, 1, engine, 0.0, optimizer, None, scaler, logging.getLogger(), model_ema=ema
            )
            async_save.wait()
        found['locked'] = taken.bytes
    engine.destroy()
    return found


def _apart(step: Any, outside: Peak, inside: Peak) -> Any:
    """A step that is watched by another mode than what is around it."""

    def stepped(*args: Any, **kwargs: Any) -> Any:
        outside.__exit__(None, None, None)
        try:
            with inside:
                return step(*args, **kwargs)
        finally:
            outside.__enter__()

    return stepped


def _micro_batch(
    config: CfgNode,
    engine: Any,
    optimizer: Any,
    scaler: Any,
    criterion: Any,
    last: bool,
    watch: AbstractContextManager | None = None,
) -> int:
    """One micro-batch; returns what is allocated between its forward and its backward pass."""
    side, batch = config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE
    with watch or nullcontext():
        images = torch.randn(batch, _CHANNELS, side, side)
        labels = torch.randint(config.MODEL.NUM_CLASSES, (batch,))
        images, labels = on_device(images, labels)
        loss = criterion(engine(images.to(input_dtype(engine))).float(), labels, images)
        forward = allocated()
        scaler(
            loss / engine.gradient_accumulation_steps(), optimizer,
            clip_grad=1.0, update_grad=last,
        )  # fmt: skip
    return forward
