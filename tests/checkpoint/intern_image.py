"""What ranks do in test_client_state.py: tags of scripts over plain DeepSpeed, and their loads."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_checkpoint,
    load_ema_checkpoint,
    load_pretrained,
    register,
)
from internvl_ds.config.tree import default_config
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.engine.registry import wrapper_of
from tests.harness.elastic import ADAM, full_state, logger
from tests.harness.model import (
    CLASSES,
    FEATURES,
    make_config,
    micro_batch,
    module_dtype,
    precision_values,
)

# An epoch is 6 micro-batches, 3 updates; a schedule of 10 epochs.
ACCUMULATION, PER_EPOCH, EPOCHS, EPOCH = 2, 6, 10, 0
UPDATES = PER_EPOCH // ACCUMULATION
DECAY, ACCURACY = 0.8, 61.5


class Net(nn.Module):
    """A frozen layer, a tied weight, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 7)
        self.frozen = nn.Linear(7, 7)
        self.tied = nn.Linear(7, 7, bias=False)
        self.again = nn.Linear(7, 7, bias=False)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(7, CLASSES)
        self.frozen.requires_grad_(False)
        self.register_buffer('mean', torch.randn(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x) + self.mean.to(x.dtype))
        return self.head(self.again(torch.tanh(self.tied(x + self.frozen(x)))))


class Linear(Scheduler):
    """A schedule that timm has not."""

    def __init__(self, optimizer: Any, t_initial: int, lr_min_rate: float) -> None:
        super().__init__(optimizer, 'lr', t_in_epochs=False)
        self.t_initial, self.lr_min_rate = t_initial, lr_min_rate

    def _get_lr(self, t: int) -> list[float]:
        left = 1 - (1 - self.lr_min_rate) * t / self.t_initial
        return [value * left for value in self.base_values]


class Average(nn.Module):
    """InternImage's: a buffer for each trained parameter of the engine, updated on rank 0."""

    def __init__(self, engine: Any, decay: float) -> None:
        super().__init__()
        self.decay, self.updates = decay, 0
        for name, p in engine.named_parameters():
            if p.requires_grad:
                self.register_buffer(name.replace('.', ''), p.detach().clone())

    def forward(self, engine: Any) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in engine.named_parameters():
            if p.requires_grad and rank() == 0:
                average = getattr(self, name.replace('.', ''))
                average.sub_((1 - decay) * (average - p.detach()))


def groups_of(model: nn.Module, lr: float = 1e-2) -> list[dict[str, Any]]:
    """One group for each trained tensor."""
    return [
        {
            'params': [p],
            'weight_decay': 0.0 if p.dim() == 1 else 0.05,
            'lr': lr * (0.5 if name.startswith('stem') else 1.0),
            'name': name,
        }
        for name, p in model.named_parameters()
        if p.requires_grad
    ]


def make_schedule(optimizer: Any, kind: str, accumulation: int) -> Scheduler:
    length = EPOCHS * PER_EPOCH // accumulation
    if kind == 'linear':
        return Linear(optimizer, length, 0.01)
    return CosineLRScheduler(
        optimizer, length, 1e-5, warmup_t=PER_EPOCH // accumulation * 2, warmup_lr_init=1e-4,
        t_in_epochs=False,
    )  # fmt: skip


def plain_config(stage: int, precision: str) -> dict[str, Any]:
    tree: dict[str, Any] = {
        'train_micro_batch_size_per_gpu': 16 // ACCUMULATION // world_size(),
        'gradient_accumulation_steps': ACCUMULATION,
        'gradient_clipping': 5.0,
        'optimizer': {'type': 'AdamW', 'params': {'lr': 1e-2, 'eps': 1e-8, 'torch_adam': True}},
        'zero_optimization': {
            'stage': stage,
            'offload_optimizer': {'device': 'none'},
            'offload_param': {'device': 'none'},
        },
        'zero_force_ds_cpu_optimizer': False,
        'steps_per_print': 10**10,
    }
    if precision != 'fp32':
        tree[precision] = {
            'enabled': True,
            **({'initial_scale_power': 9} if precision == 'fp16' else {}),
        }
    return tree


def plain_engine(stage: int, precision: str, seed: int = 0, config: Any = None) -> Any:
    precision_values(precision)
    torch.manual_seed(seed)
    model = Net()
    engine, *_ = deepspeed.initialize(
        config=config or plain_config(stage, precision), model=model,
        model_parameters=groups_of(model),
    )  # fmt: skip
    return engine


def train(
    engine: Any, precision: str, schedule: Scheduler, average: Average, in_updates: bool = False
) -> None:
    """An epoch of InternImage's loop, whose schedule counts micro-batches."""
    for index in range(PER_EPOCH):
        x, y = micro_batch(index // ACCUMULATION, index % ACCUMULATION, ACCUMULATION, rank(), 2)
        logits = engine(x.to(module_dtype(precision))).float()
        engine.backward(nn.functional.cross_entropy(logits, y))
        with torch.no_grad():  # DeepSpeed 0.18 fails without at stages 1 and 2
            engine.step()
        average(engine)
        if (index + 1) % ACCUMULATION == 0:
            micro = EPOCH * PER_EPOCH + index
            schedule.step_update((micro + 1) // ACCUMULATION if in_updates else micro)


def save_as_intern_image(
    root: str, stage: int, precision: str, kind: str = 'cosine', **more: Any
) -> dict[str, Any]:
    """An epoch and its tag; returns its path and all that is in it."""
    engine = plain_engine(stage, precision)
    schedule, average = make_schedule(engine.optimizer, kind, 1), Average(engine, DECAY)
    train(engine, precision, schedule, average)
    config = default_config()
    config.TRAIN.EPOCHS, config.TRAIN.EMA.DECAY = EPOCHS, DECAY
    config.TRAIN.ACCUMULATION_STEPS = ACCUMULATION
    config.freeze()
    output = f'{root}/{precision}{stage}{kind}'
    engine.save_checkpoint(
        output,
        tag=f'epoch{EPOCH}',
        client_state={
            'custom_lr_scheduler': schedule.state_dict(),
            'max_accuracy': ACCURACY,
            'epoch': EPOCH,
            'config': config,
            'max_accuracy_ema': ACCURACY + 1,
            'model_ema': average.state_dict(),
            **more,
        },
    )
    return _contents(engine, f'{output}/epoch{EPOCH}', average)


def save_as_others(root: str, stage: int) -> dict[str, Any]:
    """A script that names its ds_config's file, and keeps what this package would, by its names."""
    file = Path(root, f'ds{stage}.json')
    if rank() == 0:
        file.write_text(json.dumps(plain_config(stage, 'fp32')))
    torch.distributed.barrier()
    engine = plain_engine(stage, 'fp32', config=str(file))
    schedule, average = (
        make_schedule(engine.optimizer, 'cosine', ACCUMULATION),
        Average(engine, DECAY),
    )
    train(engine, 'fp32', schedule, average, in_updates=True)
    averaged = dict(average.named_buffers())
    whole = {
        name: averaged.get(f'module{name.replace(".", "")}', tensor)
        for name, tensor in engine.module.state_dict().items()
    }
    whole['again.weight'] = whole['tied.weight']
    engine.save_checkpoint(
        f'{root}/others{stage}',
        tag='global_step3',
        client_state={
            'epoch': torch.tensor(EPOCH),
            'max_accuracy': torch.tensor(ACCURACY),
            'lr_scheduler': schedule.state_dict(),
            'model_ema': {f'module.{name}': tensor for name, tensor in whole.items()},
            'step': 7,  # of the script's own counting
            'best_top5': 88.0,
        },
    )
    return _contents(engine, f'{root}/others{stage}/global_step3', average)


def _contents(engine: Any, path: str, average: Average) -> dict[str, Any]:
    found = {
        'path': path,
        'state': full_state(engine, ADAM),
        'average': _values(average.state_dict().items()),
        'weights': _values(engine.module.named_parameters()),
        'scale': getattr(getattr(engine.optimizer, 'loss_scaler', None), 'cur_scale', None),
    }
    engine.destroy()
    return found


def as_fused_adam(saved: dict[str, Any], name: str, early: bool) -> dict[str, Any]:
    """A tag's copy with its optimizer as FusedAdam keeps it, which needs a GPU.

    Args:
        saved: what `save_as_intern_image` returned.
        name: of the copy.
        early: as before DeepSpeed 0.10, the step in the parameter groups only.
    """
    path, copy = Path(saved['path']), Path(saved['path']).with_name(name)
    if rank() == 0:
        shutil.copytree(path, copy)
        for file in copy.glob('*_optim_states.pt'):
            content = torch.load(file, weights_only=False)
            optimizer = content['optimizer_state_dict']['base_optimizer_state']
            for state in optimizer['state'].values():
                state['step'] = int(state['step'])
                if early:
                    del state['step']
            known = ('lr', 'betas', 'eps', 'weight_decay', 'name', 'params')
            optimizer['param_groups'] = [
                {k: group[k] for k in known}
                | {'bias_correction': True, 'step': UPDATES if early else 0}
                for group in optimizer['param_groups']
            ]
            torch.save(content, file)
        if early:
            (file,) = copy.glob('*_model_states.pt')
            torch.save({**torch.load(file, weights_only=False), 'ds_version': '0.8.3'}, file)
    torch.distributed.barrier()
    return {**saved, 'path': str(copy)}


def save_tags(root: str) -> dict[str, Any]:
    """A tag of every form."""
    half = save_as_intern_image(root, 1, 'bf16')
    return {
        'bf16': half,
        'fused': as_fused_adam(half, 'fused', early=False),
        'early fused': as_fused_adam(half, 'early', early=True),
        'fp16': save_as_intern_image(root, 2, 'fp16'),
        'linear': save_as_intern_image(root, 2, 'fp32', 'linear', model_ema=None),
        'others': save_as_others(root, 2),
        'others 0': save_as_others(root, 0),
    }


def _values(tensors: Any) -> dict[str, list[float]]:
    return {name: t.detach().float().flatten().tolist() for name, t in tensors}


class Run:
    """An engine of this package for the same model."""

    def __init__(
        self, stage: int, precision: str, kind: str = 'cosine', schedule_in: str = 'updates'
    ) -> None:
        self.dtype = module_dtype(precision)
        self.config = make_config(
            '', DATA__BATCH_SIZE=16 // ACCUMULATION // world_size(),
            TRAIN__ACCUMULATION_STEPS=ACCUMULATION, **precision_values(precision),
        )  # fmt: skip
        torch.manual_seed(9)
        model = Net()
        client = torch.optim.AdamW(groups_of(model))
        self.schedule = make_schedule(client, kind, ACCUMULATION if schedule_in == 'updates' else 1)
        zero = {'zero_optimization': {'stage': stage}, 'zero_force_ds_cpu_optimizer': False}
        self.engine, self.optimizer = initialize(
            self.config, model, client, zero, lr_scheduler=self.schedule, schedule_in=schedule_in
        )
        self.scaler = NativeScalerWithGradNormCount()

    def load(self, path: str, **values: Any) -> dict[str, Any]:
        config = self.config.clone()
        config.defrost()
        config.MODEL.RESUME = path
        for key, value in values.items():
            config[key] = value
        with said() as lines:
            accuracy = load_checkpoint(
                config, self.engine, self.optimizer, self.schedule, None, logger
            )
        return {
            'accuracy': accuracy,
            'epoch': config.TRAIN.START_EPOCH,
            'state': full_state(self.engine, ADAM) if not values else None,
            'updates': self.engine.global_steps,
            'lrs': self.lrs(),
            'scale': None if (s := wrapper_of(self.engine).scale) is None else s.scale,
            'said': lines,
        }

    def lrs(self) -> dict[str, float]:
        return {
            name: group['lr']
            for group in self.engine.basic_optimizer.param_groups
            for name in group.get('param_names') or [group['name']]
        }

    def update(self) -> dict[str, float]:
        """One update; the lrs after it."""
        for micro in range(ACCUMULATION):
            x, y = micro_batch(UPDATES, micro, ACCUMULATION, rank(), world_size())
            loss = nn.functional.cross_entropy(self.engine(x.to(self.dtype)).float(), y)
            self.scaler(loss / ACCUMULATION, self.optimizer, update_grad=micro == ACCUMULATION - 1)
        return self.lrs()

    def load_average(self, path: str, warmup: bool = False) -> dict[str, Any]:
        ema = ShardedEma(self.engine, 0.5, warmup)
        self.config.defrost()
        self.config.MODEL.RESUME = path
        with said() as lines:
            accuracy = load_ema_checkpoint(self.config, ema, logger)
        values = _values(ema.state_dict().items())
        numbers = [accuracy, ema.decay, ema.num_updates]
        return {'values': values, 'numbers': numbers, 'said': lines}


@contextmanager
def said() -> Iterator[list[str]]:
    """What is logged meanwhile, without where it stands."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def load_tags(loads: list[tuple[str, int, str, str, str]]) -> list[Any]:
    """Each of (tag, stage, precision, schedule, what it counts) into an engine of `initialize`."""
    found = []
    for path, *rest in loads:
        run = Run(*rest)
        got = {**run.load(path), 'average': run.load_average(path)}
        found.append({**got, 'next': run.update()})
        run.engine.destroy()
    return found


def load_in_own_engines(loads: list[tuple[str, int, str]]) -> list[Any]:
    """Each of (tag, stage, precision) into an engine of the script's making: DeepSpeed loads."""
    found = []
    for path, stage, precision in loads:
        run = object.__new__(Run)
        run.config = make_config('', TRAIN__ACCUMULATION_STEPS=ACCUMULATION)
        run.engine = register(plain_engine(stage, precision, 9))
        run.optimizer = run.engine.optimizer
        run.schedule = make_schedule(run.engine.optimizer, 'cosine', 1)
        found.append({**run.load(path), 'average': run.load_average(path, warmup=True)})
        run.engine.destroy()
    return found


def evaluate(path: str) -> dict[str, Any]:
    """EVAL_MODE into an engine and a plain module; the average as pretrained weights."""
    run = Run(3, 'bf16')
    found = {'accuracy': run.load(path, EVAL_MODE=True)['accuracy']}
    run.engine.destroy()
    plain, averaged = Net(), Net()
    config = make_config('', EVAL_MODE=True, MODEL__RESUME=path)
    load_checkpoint(config, plain, None, None, None, logger)
    found['weights'] = _values(plain.named_parameters())
    config = make_config('', MODEL__PRETRAINED=path, MODEL__PRETRAINED_EMA=True)
    load_pretrained(config, averaged, logger)
    found['averaged'] = _values(averaged.named_parameters())
    return found
