"""What ranks do in test_batch_norm.py: the head's batch norm, alone and in engines."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import nn

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_checkpoint,
    load_ema_checkpoint,
    save_checkpoint,
)
from internvl_ds.config.tree import default_config
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.errors import ConfigError
from internvl_ds.train.model import build_model, input_dtype
from internvl_ds.train.models.batch_norm import SyncBatchNorm
from tests.harness.model import on_device, zero_json
from tests.harness.training import whole_weights
from tests.train.models.tiny import CLASSES, difference, images, tiny_config

_log = logging.getLogger('norming')
_UPDATES, _DECAY, _LR = 2, 0.5, 0.1


def beside_plain(cells: list[tuple[int, str, str]], root: str) -> dict[str, Any]:
    """The norm alone on batches of other sizes, and in an engine of each (stage, level, type)."""
    return {
        'alone': _alone(),
        'engines': [
            _in_engine(*cell, f'{root}/{index}', freeze=cell[1] != 'O0')
            for index, cell in enumerate(cells)
        ],
    }


def _alone() -> dict[str, float]:
    """5 images here and 3 there, and their gradients, beside torch's norm of the 8."""
    numbers = torch.Generator().manual_seed(0)
    whole = torch.randn(8, 6, generator=numbers) * 2 + torch.arange(6.0) * 30
    weights = torch.randn(8, 6, generator=numbers)
    plain, norm = nn.BatchNorm1d(6, eps=1e-6).double(), SyncBatchNorm(6)
    for module in (plain, norm):
        module.weight.data = torch.linspace(0.5, 2.0, 6, dtype=module.weight.dtype)
    wide = whole.double().requires_grad_()
    plain_out = plain(wide)
    (plain_out * weights.double()).sum().backward()
    own = slice(0, 5) if rank() == 0 else slice(5, 8)
    x = whole[own].clone().requires_grad_()
    out = norm(x)
    (out * weights[own]).sum().backward()
    for parameter in norm.parameters():  # as a gradient of the whole batch
        dist.all_reduce(parameter.grad)
    pairs = {
        'out': (out, plain_out[own]),
        'input': (x.grad, wide.grad[own]),
        'weight': (norm.weight.grad, plain.weight.grad),
        'bias': (norm.bias.grad, plain.bias.grad),
        'mean': (norm.running_mean, plain.running_mean),
        'var': (norm.running_var, plain.running_var),
        'evaluated': (norm.eval()(x), plain.eval()(wide)[own]),
    }
    return {name: difference(a.detach(), b.detach()) for name, (a, b) in pairs.items()}


def _in_engine(stage: int, level: str, kind: str, output: str, freeze: bool) -> dict[str, Any]:
    config = tiny_config(
        FREEZE_VIT=freeze, DEPTH=1, DATA__BATCH_SIZE=4, TRAIN__AUTO_RESUME=False,
        TRAIN__USE_CHECKPOINT=not freeze,
    )  # fmt: skip
    config.AMP_OPT_LEVEL, config.AMP_TYPE, config.OUTPUT = level, kind, output
    if (level, kind) == ('O2', 'float16'):  # the CPU computes in it, and DeepSpeed refuses to
        get_accelerator().is_fp16_supported = lambda: True
    engine, optimizer = _engine(config, stage)
    module, scaler = engine.module, NativeScalerWithGradNormCount()
    ema, seen = ShardedEma(engine, _DECAY), []
    module.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    engine.train()
    average = {name: b.double() for name, b in module.norm.named_buffers()}
    for update in range(_UPDATES):
        own = slice(4 * rank(), 4 * rank() + 4)
        x, y = on_device(images(8, seed=update)[own].to(input_dtype(engine)), _labels()[own])
        loss = F.cross_entropy(engine(x).float(), y)
        scaler(loss, optimizer, parameters=engine.parameters())
        ema.update()
        if not scaler.step_was_skipped:
            for name, buffer in module.norm.named_buffers():
                average[name].lerp_(buffer.double(), 1 - _DECAY)
    save_checkpoint(config, 0, engine, 0.0, optimizer, None, scaler, _log, model_ema=ema)
    buffers = {n: b.clone() for n, b in module.norm.named_buffers()}
    averaged = ema.state_dict()
    result = {
        'dtypes': sorted({str(b.dtype) for b in buffers.values()}),
        'off': _off(seen, buffers),
        'average_off': max(
            difference(averaged[f'norm.{n}'], average[n]) for n in average if 'running' in n
        ),
        'weights_off': _beside_plain_loop(config, engine) if level == 'O0' else 0.0,
        'resumed': {},
    }
    engine.destroy()
    for other in (stage, 3 - stage):
        result['resumed'][str(other)] = _resumed(config, other, buffers, averaged)
    return result


def _off(seen: list[torch.Tensor], buffers: dict[str, torch.Tensor]) -> float:
    """How far the running statistics are from those of what came to the norm on all ranks."""
    want = nn.BatchNorm1d(seen[0].shape[1]).double()
    for own in seen:
        parts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(parts, own)
        want(torch.cat(parts).double())
    same = want.num_batches_tracked == buffers['num_batches_tracked']
    names = ('running_mean', 'running_var')
    return max(difference(buffers[n], getattr(want, n)) for n in names) if same else float('inf')


def _beside_plain_loop(config: Any, engine: Any) -> float:
    """The difference to weights of a plain loop on the whole batch, by how far they went."""
    torch.manual_seed(0)
    model = build_model(config)
    model.norm = nn.BatchNorm1d(64, eps=1e-6)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), _LR)
    for update in range(_UPDATES):
        F.cross_entropy(model.train()(images(8, seed=update)), _labels()).backward()
        optimizer.step()
        optimizer.zero_grad()
    got, want = whole_weights(engine), dict(model.named_parameters())
    moved = torch.stack([(want[n] - start[n]).norm() for n in start]).norm()
    off = torch.stack([(want[n] - got[n]).norm() for n in start]).norm()
    return float((off / moved).detach())


def _resumed(config: Any, stage: int, buffers: Any, averaged: Any) -> list[str]:
    """What of the statistics, and of their average, is not bit for bit the same after a load."""
    config = config.clone()
    config.MODEL.RESUME = str(Path(config.OUTPUT, 'ckpt_epoch_0'))
    engine, optimizer = _engine(config, stage)
    ema = ShardedEma(engine, _DECAY)
    load_checkpoint(config, engine, optimizer, None, NativeScalerWithGradNormCount(), _log)
    load_ema_checkpoint(config, ema, _log)
    found, loaded = ema.state_dict(), dict(engine.module.norm.named_buffers())
    engine.destroy()
    wrong = [n for n, b in buffers.items() if not torch.equal(loaded[n], b)]
    return wrong + [n for n, b in averaged.items() if not torch.equal(found[n], b)]


def _engine(config: Any, stage: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = build_model(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, _LR)
    return initialize(config, model, optimizer, {'zero_optimization': {'stage': stage}})


def _labels() -> torch.Tensor:
    return torch.arange(8) % CLASSES


def _convolutional(level: str, synced: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = default_config()
    config.MODEL.TYPE, config.MODEL.NAME, config.MODEL.NUM_CLASSES = 'timm', 'resnet10t', 4
    config.MODEL.DROP_PATH_RATE = 0.0
    config.MODEL.SYNC_BN = synced
    config.DATA.BATCH_SIZE = 8 // world_size()
    config.AMP_OPT_LEVEL, config.AMP_TYPE = level, 'bfloat16'
    return config, build_model(config)


def train_convolutions(stages: list[int], level: str) -> dict[str, dict[str, Any]]:
    """The norms of a net's tensors after updates on batches of 8 in all, of which ranks share."""
    found = {}
    for stage in stages:
        config, model = _convolutional(level, synced=True)
        client = torch.optim.SGD(model.parameters(), lr=_LR)
        engine, optimizer = initialize(config, model, client, zero_json(stage))
        scaler, size = NativeScalerWithGradNormCount(), 8 // world_size()
        for step in range(3):
            numbers = torch.Generator().manual_seed(step)
            x = torch.randn(8, 3, 32, 32, generator=numbers)
            y = torch.randint(4, (8,), generator=numbers)
            own = slice(rank() * size, (rank() + 1) * size)
            x, y = on_device(x[own].to(input_dtype(engine)), y[own])
            scaler(F.cross_entropy(engine(x).float(), y), optimizer)
        buffers = dict(engine.module.named_buffers())
        values = {**whole_weights(engine), **buffers}
        found[str(stage)] = {n: float(t.float().norm()) for n, t in values.items()}
    return found


def refusals() -> dict[str, str]:
    """What initialize says of a net whose batch norms are torch's, in a bf16 engine."""
    said = {}
    for stage in (0, 1, 3):
        config, model = _convolutional('O2', synced=False)
        client = torch.optim.SGD(model.parameters(), lr=_LR)
        try:
            initialize(config, model, client, zero_json(stage))
        except ConfigError as error:
            said[str(stage)] = str(error)
    return said
