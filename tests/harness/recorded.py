"""What ranks do for tests/harness/recorded_tags.py: tags of each layout, with all in them."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_checkpoint,
    load_ema_checkpoint,
    save_checkpoint,
)
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

# Every stage in both precisions, and fp16, which has a loss scale; or each stage once.
LAYOUTS = [*((stage, kind) for kind in ('bf16', 'fp32') for stage in range(4)), (2, 'fp16')]
FEW = [(0, 'bf16'), (1, 'fp32'), (2, 'bf16'), (3, 'fp32')]
UPDATES, EPOCH, ACCURACY, DECAY = 2, 4, 61.5, 0.75


class Net(nn.Module):
    """As small as can be: a frozen layer, a tied weight, buffers, sizes that divide by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 3)
        self.frozen = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.again = nn.Linear(3, 3, bias=False)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(3, CLASSES)
        self.frozen.requires_grad_(False)
        self.register_buffer('mean', torch.randn(3))
        self.register_buffer('seen', torch.randint(1000, ()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.stem(x) + self.mean.to(x.dtype))
        return self.head(self.again(torch.tanh(self.tied(x + self.frozen(x)))))


def make_client(model: nn.Module) -> torch.optim.AdamW:
    """Two groups, which `initialize` leaves as they are."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {'params': [p for p in trained if p.dim() > 1], 'weight_decay': 0.05},
        {'params': [p for p in trained if p.dim() == 1], 'weight_decay': 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


class Run:
    """An engine of a layout, with all that a run saves beside it."""

    def __init__(self, layout: tuple[int, str], seed: int, output: str = '') -> None:
        stage, precision = layout
        self.config = make_config(
            output, DATA__BATCH_SIZE=16 // world_size(), **precision_values(precision)
        )
        self.dtype = module_dtype(precision)
        torch.manual_seed(seed)
        model = Net()
        client = make_client(model)
        self.scheduler = CosineLRScheduler(client, t_initial=30, warmup_t=4, t_in_epochs=False)
        zero = {'stage': stage, **({'stage3_param_persistence_threshold': 5} if stage == 3 else {})}
        tree = {'zero_optimization': zero, 'zero_force_ds_cpu_optimizer': False}
        self.engine, self.optimizer = initialize(
            self.config, model, client, tree, lr_scheduler=self.scheduler
        )
        self.scaler = NativeScalerWithGradNormCount()
        self.ema = ShardedEma(self.engine, DECAY)

    def train(self) -> None:
        for step in range(UPDATES):
            x, y = micro_batch(step, 0, 1, rank(), world_size())
            loss = nn.functional.cross_entropy(self.engine(x.to(self.dtype)).float(), y)
            self.scaler(loss, self.optimizer, 5.0)
            self.ema.update()

    def save(self) -> None:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        save_checkpoint(
            self.config, EPOCH, self.engine, ACCURACY, self.optimizer, self.scheduler, self.scaler,
            logger, model_ema=self.ema, max_accuracy_ema=ACCURACY + 1, ema_decay=DECAY,
        )  # fmt: skip

    def save_plainly(self, output: str) -> None:
        """As a script over plain DeepSpeed would."""
        client_state = {
            'epoch': EPOCH, 'max_accuracy': ACCURACY, 'lr_scheduler': self.scheduler.state_dict()
        }  # fmt: skip
        self.engine.save_checkpoint(output, tag=f'ckpt_epoch_{EPOCH}', client_state=client_state)

    def load(self, tag: str) -> dict[str, Any]:
        """Loads a tag, its average too, and says what is there then."""
        self.config.defrost()
        self.config.MODEL.RESUME = tag
        self.config.TRAIN.START_EPOCH = 0
        accuracy = load_checkpoint(
            self.config, self.engine, self.optimizer, self.scheduler, self.scaler, logger
        )
        accuracy_ema = load_ema_checkpoint(self.config, self.ema, logger)
        numbers = [accuracy, accuracy_ema, self.config.TRAIN.START_EPOCH - 1]
        return {**self.contents(), 'numbers': numbers}

    def contents(self) -> dict[str, Any]:
        """All state by name: digests of tensors, and numbers."""
        module, scale = self.engine.module, wrapper_of(self.engine).scale
        with self.ema.swapped_in():
            average = _short(full_state(self.engine, ()))
        with deepspeed.zero.GatheredParameters(
            list(module.frozen.parameters()), enabled=hasattr(module.frozen.weight, 'ds_id')
        ):
            frozen = {name: digest(p) for name, p in module.frozen.named_parameters()}
            rounded = {name: digest(p.bfloat16()) for name, p in module.frozen.named_parameters()}
        return {
            'state': _short(full_state(self.engine, ADAM)),
            'frozen': frozen,
            'frozen_bf16': rounded,
            'buffers': {name: digest(buffer) for name, buffer in module.named_buffers()},
            'average': average,
            'average_numbers': [self.ema.decay, self.ema.num_updates],
            'groups': [
                [group[key] for key in ('lr', 'weight_decay', 'betas')]
                for group in self.engine.basic_optimizer.param_groups
            ],
            'schedule': self.scheduler.state_dict(),
            'counts': [self.engine.global_steps, self.engine.skipped_steps],
            'loss_scale': None if scale is None else scale.state_dict(),
            'numbers': [ACCURACY, ACCURACY + 1, EPOCH],
        }


def other_layout(layout: tuple[int, str]) -> tuple[int, str]:
    """Another stage and precision, among the same ones."""
    return (layout[0] + 1) % 4, 'fp32' if layout[1] == 'bf16' else 'bf16'


def save_all(root: str, name: str, few: bool, plain: bool) -> dict[str, Any]:
    """Saves a tag of each layout; returns what each holds. No two tags have a value in common."""
    found = {}
    for stage, precision in FEW if few else LAYOUTS:
        key = f'{precision}_zero{stage}'
        run = Run((stage, precision), zlib.crc32(f'{name} {key}'.encode()), f'{root}/{key}')
        run.train()
        if plain:
            run.save_plainly(f'{root}/{key}')
        else:
            run.save()
        found[key] = {**run.contents(), 'weights': run_weights(run)}
        if plain:
            del found[key]['average'], found[key]['average_numbers']
            found[key]['numbers'][1] = 0.0
        run.engine.destroy()
    return found


def run_weights(run: Run) -> dict[str, str]:
    """Digests of what the module computes with."""
    parameters = dict(run.engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(
        list(parameters.values()), enabled=hasattr(parameters['stem.weight'], 'ds_id')
    ):
        return {name: digest(p) for name, p in parameters.items()}


def load_all(roots: list[str]) -> dict[str, dict[str, str]]:
    """Loads every tag of every root in its own layout, in another, and by plain DeepSpeed.

    Returns:
        'ROOT/LAYOUT' -> way -> 'ok', or what differs, or the error.
    """
    records = {root: json.loads(Path(root, 'record.json').read_text()) for root in roots}
    results: dict[str, dict[str, str]] = {
        f'{root}/{key}': {} for root, record in records.items() for key in record
    }

    def tags(layout: tuple[int, str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        key = '{1}_zero{0}'.format(*layout)
        for root, record in records.items():
            if key in record:
                yield f'{root}/{key}', f'{root}/{key}/ckpt_epoch_{EPOCH}', record[key]

    for layout in LAYOUTS:
        sources = [own for own in LAYOUTS if other_layout(own) == layout]
        if not any(True for one in (layout, *sources) for _ in tags(one)):
            continue
        run = Run(layout, 9)
        for key, tag, record in tags(layout):
            results[key]['same layout'] = _said(lambda tag=tag: run.load(tag), record)
        for source in sources:
            for key, tag, record in tags(source):
                results[key]['another layout'] = _said(
                    lambda tag=tag: run.load(tag), _moved(record, layout)
                )
        with _plain_engine(run) as engine:
            for key, tag, record in tags(layout):

                def load(tag: str = tag) -> dict[str, Any]:
                    path, _ = engine.load_checkpoint(str(Path(tag).parent), tag=Path(tag).name)
                    assert path is not None
                    return {'state': _short(full_state(engine, ADAM))}

                results[key]['deepspeed'] = _said(load, {'state': record['state']})
        run.engine.destroy()
    return results


@contextmanager
def _plain_engine(run: Run) -> Iterator[Any]:
    """DeepSpeed's own engine of a run's layout, with its own reader."""
    torch.manual_seed(8)
    model = Net()
    tree = json.loads(json.dumps(wrapper_of(run.engine).ds_config, default=str))
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_client(model), config=tree)
    yield engine
    engine.destroy()


def _said(load: Callable[[], dict[str, Any]], record: dict[str, Any]) -> str:
    try:
        found = json.loads(json.dumps(load()))
    except Exception as error:  # each is a finding
        return f'{type(error).__name__}: {error}'
    return 'ok' if (wrong := differences(found, record)) is None else wrong


def _moved(record: dict[str, Any], layout: tuple[int, str]) -> dict[str, Any]:
    """What a load into another layout is to find: frozen weights have no masters."""
    moved = {key: value for key, value in record.items() if key != 'loss_scale'}
    if layout[1] == 'bf16':
        moved['frozen'] = moved['frozen_bf16']
    return moved


def differences(found: dict[str, Any], record: dict[str, Any]) -> str | None:
    """Names what is not as it was recorded; only what both have is compared."""
    wrong = []
    for key in record.keys() & found.keys():
        was, now = record[key], found[key]
        if isinstance(was, dict) and isinstance(now, dict):
            wrong += [f'{key} {k}' for k in was.keys() | now.keys() if was.get(k) != now.get(k)]
        elif was != now:
            wrong.append(f'{key} {was} -> {now}')
    return f'differs: {", ".join(sorted(wrong))}' if wrong else None


def digest(tensor: torch.Tensor) -> str:
    """The same for equal values of any dtype that float32 holds."""
    values = tensor.detach().float().reshape(-1).contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:12]


def _short(state: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {n: [v[:12] if isinstance(v, str) else v for v in kept] for n, kept in state.items()}
