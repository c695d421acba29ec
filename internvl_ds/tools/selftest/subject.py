"""What the self-test trains: a small model by an engine, and in plain PyTorch beside it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.tree import default_config, set_options
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.engine.grad_scaler import NativeScalerWithGradNormCount
from internvl_ds.engine.initialize import initialize
from internvl_ds.engine.registry import wrapper_of

Tensors = dict[str, torch.Tensor]

# Sizes that two ranks cannot share without padding.
_FEATURES, _WIDTH, _CLASSES, _IMAGES = 24, 37, 7, 4
CLIP, DECAY, _SCALE_POWER = 0.4, 0.9, 8
LIMIT = 180  # seconds that a rank waits for the others
UPDATES, OVERFLOW = 4, 1  # the second of four has an infinite gradient on the last rank

FP32 = 'fp32'
# Precision -> AMP_OPT_LEVEL, AMP_TYPE, the dtype of the module, that of autocast.
_PRECISIONS: Mapping[str, tuple[str, str, torch.dtype, torch.dtype | None]] = {
    FP32: ('O0', 'float16', torch.float32, None),
    'bf16': ('O2', 'bfloat16', torch.bfloat16, None),
    'fp16': ('O2', 'float16', torch.float16, None),
    'autocast bf16': ('O1', 'bfloat16', torch.float32, torch.bfloat16),
    'autocast fp16': ('O1', 'float16', torch.float32, torch.float16),
}
PRECISIONS = tuple(_PRECISIONS)


class Subject(nn.Module):
    """Two layers, a frozen one between them, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(_FEATURES, _WIDTH)
        self.frozen = nn.Linear(_WIDTH, _WIDTH).requires_grad_(False)
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, _CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, features) -> logits (N, classes)."""
        x = torch.tanh(self.stem(x))
        return self.head(torch.tanh(self.norm(x + self.frozen(x))))


@dataclass
class Course:
    """What a few updates did: norms before clipping, weights and their average afterwards."""

    norms: list[float] = field(default_factory=list)
    start: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    average: Tensors = field(default_factory=dict)


def is_supported(precision: str) -> bool:
    """Whether this accelerator computes in a precision."""
    if 'fp16' in precision:
        return bool(get_accelerator().is_fp16_supported())
    return 'bf16' not in precision or bool(get_accelerator().is_bf16_supported())


def rounding_of(precision: str) -> float:
    """What a gradient may differ by, as a share of it.

    In 16 bits an element is rounded up to eight times on one side and not on the other, on the way
    through two layers of four micro-batches. In fp32 the sums have another order.
    """
    *_, dtype, autocast = _PRECISIONS[precision]
    low = autocast or dtype
    return 1e-5 if low == torch.float32 else 8 * torch.finfo(low).eps


def settings(precision: str = FP32, **options: Any) -> CfgNode:
    """The yacs tree of an engine; ``options`` are dotted keys, as OUTPUT or CHECKPOINT__ASYNC."""
    level, kind, _, _ = _PRECISIONS[precision]
    values = {'AMP_OPT_LEVEL': level, 'AMP_TYPE': kind, 'DATA.BATCH_SIZE': _IMAGES}
    values |= {'TRAIN.CLIP_GRAD': CLIP, 'OUTPUT': '', 'COMM.TIMEOUT': LIMIT}
    values |= {key.replace('__', '.'): value for key, value in options.items()}
    return set_options(default_config(), values)


def _parts() -> tuple[Subject, torch.optim.Optimizer]:
    """The model at its start, and SGD over two groups: it shows a gradient of the wrong size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Subject()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {'params': [p for p in trained if p.dim() > 1], 'lr': 0.1, 'weight_decay': 0.05},
        {'params': [p for p in trained if p.dim() == 1], 'lr': 0.05},
    ]
    return model, torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def make_engine(config: CfgNode, stage: int) -> tuple[Any, Any]:
    """An engine of a ZeRO stage, and its optimizer. Collective: every rank calls it."""
    zero: dict[str, Any] = {'stage': stage}
    if stage == 3:
        zero['stage3_param_persistence_threshold'] = 0
    scale = {'fp16': {'enabled': 'auto', 'initial_scale_power': _SCALE_POWER}}
    half = config.AMP_OPT_LEVEL != 'O0' and config.AMP_TYPE == 'float16'
    return initialize(config, *_parts(), {'zero_optimization': zero, **(scale if half else {})})


def _batch(update: int, of_rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * update + of_rank)
    x = torch.randn(_IMAGES, _FEATURES, generator=generator)
    return x.to(device), torch.randint(_CLASSES, (_IMAGES,), generator=generator).to(device)


def loss_of(engine: Any, update: int) -> torch.Tensor:
    """The loss of this rank's batch. Collective: every rank calls it."""
    x, y = _batch(update, rank(), engine.device)
    dtype = next(engine.module.parameters()).dtype
    return nn.functional.cross_entropy(engine(x.to(dtype)).float(), y)


def train(engine: Any, optimizer: Any, scaler: Any, update: int, poison: bool = False) -> float:
    """One update of this rank's batch; its norm. Collective: every rank calls it.

    Args:
        poison: whether the last rank's gradient is infinite.
    """
    loss = loss_of(engine, update)
    if poison and rank() == world_size() - 1:
        loss.register_hook(lambda gradient: gradient * math.inf)
    return float(scaler(loss, optimizer, CLIP, engine.parameters()))


def engine_course(precision: str, stage: int) -> Course:
    """The updates by an engine. Collective: every rank calls it."""
    engine, optimizer = make_engine(settings(precision), stage)
    scaler, average = NativeScalerWithGradNormCount(), ShardedEma(engine, DECAY)
    course = Course(start=whole_masters(engine))
    for update in range(UPDATES):
        course.norms.append(train(engine, optimizer, scaler, update, update == OVERFLOW))
        average.update(engine)
    course.weights = whole_masters(engine)
    course.average = {n: t for n, t in average.whole_tensors() if n in course.weights}
    engine.destroy()
    return course


def plain_course(precision: str, device: torch.device) -> Course:
    """The same in plain PyTorch, in one process, on the batches of all ranks.

    In an engine's 16 bits: fp32 masters beside the weights that the module computes with.
    """
    _, _, dtype, autocast = _PRECISIONS[precision]
    model, optimizer = _parts()
    low, _ = _parts()
    model.to(device)
    low = model if dtype == torch.float32 else low.to(device, dtype)
    pairs = list(zip(model.parameters(), low.parameters(), strict=True))
    for master, weight in pairs:
        master.data.copy_(weight.data)
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    course = Course(start={n: p.detach().clone() for n, p in names.items()})
    average = {n: p.detach().clone() for n, p in names.items()}
    scale = 2.0**_SCALE_POWER if torch.float16 in (dtype, autocast) else 1.0
    context = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()
    for update in range(UPDATES):
        batches = [_batch(update, r, device) for r in range(world_size())]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        if update == OVERFLOW:
            course.norms.append(math.inf)
            continue
        low.zero_grad()
        with context:
            logits = low(x.to(dtype))
        (scale * nn.functional.cross_entropy(logits.float(), y)).backward()
        for master, weight in pairs:
            if weight.grad is not None:
                master.grad = weight.grad.float() / scale
        course.norms.append(float(nn.utils.clip_grad_norm_(names.values(), CLIP)))
        optimizer.step()
        for master, weight in pairs:
            weight.data.copy_(master.data)
        for name, weight in names.items():
            average[name].lerp_(weight.detach(), 1 - DECAY)
    course.weights = {n: p.detach().clone() for n, p in names.items()}
    course.average = average
    return course


def whole_masters(engine: Any) -> Tensors:
    """The fp32 weights by name, whole on every rank and exact. Collective: every rank calls it."""
    trained = wrapper_of(engine).trained_names()
    return {n: t for n, t in ShardedEma(engine).whole_tensors() if n in trained}


def bare_update(engine: Any, loss: torch.Tensor) -> None:
    """An update without the bridge, clipped by the ds_config. Collective: every rank calls it."""
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss, scale_wrt_gas=False)
    engine.step()
    engine.get_global_grad_norm()


def distance(a: Tensors, b: Tensors) -> float:
    """The L2 norm of the difference."""
    return math.sqrt(sum(float((a[n] - b[n]).double().square().sum()) for n in b))
