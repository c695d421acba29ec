"""What ranks do in test_unused.py."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import Lookahead
from torch.nn.functional import cross_entropy

from internvl_ds import NativeScalerWithGradNormCount, initialize, load_checkpoint, save_checkpoint
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.errors import ConfigError
from tests.harness.model import (
    batch,
    make_config,
    module_dtype,
    on_device,
    precision_values,
    zero_json,
)
from tests.harness.training import whole_weights
from tests.zero.passes.agreeing import Branches

logger = logging.getLogger(__name__)

UPDATES = 6
# Name -> the layers that ranks 0 and 1 use in each update; a rank alone uses both.
WAYS: dict[str, tuple[list[str], list[str]]] = {
    'never': (['l'] * UPDATES,) * 2,
    'in turns': (['l', 'r', 'lr', 'l', 'rl', 'r'],) * 2,
    'at last': (['l', 'l', 'l', 'lr', 'lr', 'lr'],) * 2,
    'each its own': (['l', '', 'lr', '', '', 'r'], ['r', '', 'l', 'l', 'r', '']),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    'sgd': functools.partial(torch.optim.SGD, lr=0.1),
    'momentum': functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    'adam': functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
    'adamw': functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5),
}
# Where a gradient of zero is as none: for the ways of all ranks at stages 1 to 3.
HARMLESS = {('never', 'adam'), ('never', 'momentum'), ('at last', 'momentum')}
HARMLESS |= {(way, 'sgd') for way in WAYS}


class Around(torch.optim.Optimizer):
    """An optimizer around another, which has not called torch's ``__init__``."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.around, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.defaults = inner.defaults
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = (
            OrderedDict(),
            OrderedDict(),
        )

    def step(self, closure: Any = None) -> Any:
        return self.around.step(closure)


OPTIMIZERS['around'] = lambda parameters: Around(OPTIMIZERS['adamw'](parameters))
OPTIMIZERS['lookahead'] = lambda parameters: Lookahead(OPTIMIZERS['adamw'](parameters), k=2)


def make(optimizer: str) -> tuple[Branches, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Branches()
    return model, OPTIMIZERS[optimizer](model.parameters())


def plain(way: str, optimizer: str) -> dict[str, list[float]]:
    """The weights of plain PyTorch, after updates by the mean loss of both ranks' halves."""
    model, client = make(optimizer)
    for step in range(UPDATES):
        client.zero_grad()
        x, y = batch(step)
        for part, ways in zip((slice(8), slice(8, 16)), WAYS[way], strict=True):
            (cross_entropy(model(x[part], ways[step]), y[part]) / 2).backward()
        client.step()
    return {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}


def train(cells: list[tuple[str, str]], stage: int) -> list[dict[str, Any]]:
    """For each way and optimizer the weights, or the error and the updates before it."""
    return [_train(way, optimizer, stage) for way, optimizer in cells]


def _train(way: str, optimizer: str, stage: int) -> dict[str, Any]:
    ranks = [rank()] if world_size() == 2 else [0, 1]
    model, client = make(optimizer)
    config = make_config(DATA__BATCH_SIZE=8, TRAIN__ACCUMULATION_STEPS=len(ranks))
    engine, client = initialize(config, model, client, zero_json(stage))
    scaler = NativeScalerWithGradNormCount()
    try:
        for step in range(UPDATES):
            x, y = on_device(*batch(step))
            for half in ranks:
                part = slice(8 * half, 8 * half + 8)
                loss = cross_entropy(engine(x[part], way=WAYS[way][half][step]), y[part])
                scaler(loss / len(ranks), client, update_grad=half == ranks[-1])
    except ConfigError as error:
        return {'error': str(error), 'updates': engine.global_steps}
    return {n: value.flatten().tolist() for n, value in whole_weights(engine).items()}


def used_with_zeros() -> list[dict[str, Any]]:
    """For each order of passes the weights, at stage 0, beside those of plain PyTorch.

    `right` has a gradient of zero in the last pass, which is none of those that DeepSpeed makes.
    """
    results = []
    for passes in ('skip', 'skip, again', 'twice'):
        (model, client), (other, right) = make('adamw'), make('adamw')
        config = make_config(DATA__BATCH_SIZE=16, TRAIN__ACCUMULATION_STEPS=1)
        engine, client = initialize(config, model, client, zero_json(0))
        x, y = on_device(*batch(0))
        other.to(engine.device)
        scaler = NativeScalerWithGradNormCount()
        if 'skip' in passes:
            for _ in passes.split(','):
                scaler(float('nan') * cross_entropy(engine(x, way='l'), y), client)
        else:
            engine.backward(cross_entropy(engine(x, way='l'), y))
            cross_entropy(other(x, 'l'), y).backward()
        loss, wanted = (
            cross_entropy(f(x, way='l'), y) + 0 * sum(p.sum() for p in f.right.parameters())
            for f in (engine, other)
        )
        engine.backward(loss)
        engine.step()
        wanted.backward()
        right.step()
        pairs = ((n, p.flatten().tolist()) for n, p in other.named_parameters())
        got = {n: p.flatten().tolist() for n, p in whole_weights(engine).items()}
        results.append({'got': got, 'right': dict(pairs)})
    return results


def freeze_within(manual_at: int | None = None) -> dict[str, Any]:
    """Freezes `right` for the second micro-batch of each odd update, or by hand at a stage.

    Returns the weights, or the error.
    """
    model, client = make('adamw')
    config = make_config(DATA__BATCH_SIZE=4, TRAIN__ACCUMULATION_STEPS=2)
    engine, client = initialize(config, model, client, zero_json(manual_at or 0))
    scaler = NativeScalerWithGradNormCount()
    try:
        for step in range(UPDATES):
            x, y = on_device(*batch(step))
            for micro in range(2):
                model.right.requires_grad_(not (micro and step % 2))
                part = slice(8 * rank() + 4 * micro, 8 * rank() + 4 * micro + 4)
                # Of ranks one alone uses what is frozen next.
                way = 'lr' if manual_at else 'lr'[rank()]
                loss = cross_entropy(engine(x[part], way=way), y[part])
                if manual_at is None:
                    scaler(loss / 2, client, update_grad=bool(micro))
                else:
                    engine.backward(loss)
                    engine.step()
    except ConfigError as error:
        return {'error': str(error)}
    return {n: value.flatten().tolist() for n, value in whole_weights(engine).items()}


def plain_frozen_within() -> dict[str, list[float]]:
    model, client = make('adamw')
    for step in range(UPDATES):
        x, y = batch(step)
        client.zero_grad()
        for micro in range(2):
            model.right.requires_grad_(not (micro and step % 2))
            for other, way in enumerate('lr'):
                part = slice(8 * other + 4 * micro, 8 * other + 4 * micro + 4)
                (cross_entropy(model(x[part], way), y[part]) / 4).backward()
        client.step()
    return {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}


def applied() -> dict[str, list[int]]:
    """The updates and the skipped ones, at stage 0, after three that are not skipped."""
    counts = {}
    for name in ('adamw', 'around', 'lookahead'):
        model, client = make(name)
        torch.optim.lr_scheduler.ConstantLR(client, 1.0)  # puts a step into the optimizer
        config = make_config(DATA__BATCH_SIZE=16, TRAIN__ACCUMULATION_STEPS=1)
        engine, client = initialize(config, model, client, zero_json(0))
        scaler = NativeScalerWithGradNormCount()
        for step in range(3):
            x, y = on_device(*batch(step))
            scaler(cross_entropy(engine(x, way='lr'), y), client)
        counts[name] = [engine.global_steps, engine.skipped_steps]
    return counts


def moved_in_half_precision() -> list[list[str]]:
    """The masters that each update moves, in bf16 at stage 0, ``each its own``."""
    model, client = make('adamw')
    config = make_config(
        DATA__BATCH_SIZE=8, TRAIN__ACCUMULATION_STEPS=1, **precision_values('bf16')
    )
    engine, client = initialize(config, model, client, zero_json(0))
    scaler, moved = NativeScalerWithGradNormCount(), []
    for step in range(UPDATES):
        x, y = (tensor[8 * rank() : 8 * rank() + 8] for tensor in on_device(*batch(step)))
        before = {n: p.clone() for n, p in wrapper_of(engine).masters().items()}
        out = engine(x.to(module_dtype('bf16')), way=WAYS['each its own'][rank()][step])
        scaler(cross_entropy(out.float(), y), client)
        after = wrapper_of(engine).masters()
        moved.append([n for n, p in after.items() if not torch.equal(p, before[n])])
    return moved


def resume(
    stages: list[int], way: str, optimizer: str, output: str, with_scaler: bool = True
) -> dict[str, Any]:
    """Three updates at one stage and three at another: the weights, or the second's error."""
    tag = ''
    for stage in stages:
        model, client = make(optimizer)
        config = make_config(
            output, DATA__BATCH_SIZE=8, TRAIN__ACCUMULATION_STEPS=1, MODEL__RESUME=tag
        )
        engine, client = initialize(config, model, client, zero_json(stage))
        scaler = NativeScalerWithGradNormCount()
        if tag:
            saved = scaler if with_scaler else None
            load_checkpoint(config, engine, client, None, saved, logger)
        start = engine.global_steps
        try:
            for step in range(start, start + 3):
                x, y = (tensor[8 * rank() : 8 * rank() + 8] for tensor in on_device(*batch(step)))
                loss = cross_entropy(engine(x, way=WAYS[way][rank()][step]), y)
                scaler(loss, client)
        except ConfigError as error:
            return {'error': str(error)}
        tag = save_checkpoint(config, start, engine, 0.0, client, None, scaler, logger)
    return {n: value.flatten().tolist() for n, value in whole_weights(engine).items()}


def dropped_and_skipped(stage: int) -> dict[str, list[str]]:
    """Case -> the weights that its updates moved, or the error in words."""
    cases = {
        # What only a dropped micro-batch used was not used.
        'zero_grad': [('adamw', 'lr', 'drop'), ('adamw', 'l', 'step')],
        # An update that is skipped decides nothing, and is not refused.
        'skipped first': [('adam', 'l', 'nan'), ('adam', 'lr', 'step'), ('adam', 'lr', 'step')],
        'skipped later': [('adamw', 'lr', 'step'), ('adamw', 'l', 'nan'), ('adamw', 'lr', 'step')],
        'lr 0': [('still', 'l', 'step'), ('still', 'l', 'step')],
    }
    return {name: _moved_by(stage, case) for name, case in cases.items()}


def _moved_by(stage: int, case: list[tuple[str, str, str]]) -> list[str]:
    model, client = make('adamw' if case[0][0] == 'still' else case[0][0])
    if case[0][0] == 'still':
        lazy = {'params': list(model.right.parameters()), 'lr': 0.0, 'weight_decay': 0.5}
        rest = [p for n, p in model.named_parameters() if 'right' not in n]
        client = torch.optim.AdamW([{'params': rest, 'weight_decay': 0.0}, lazy], lr=1e-2)
    config = make_config(DATA__BATCH_SIZE=8, TRAIN__ACCUMULATION_STEPS=2)
    engine, client = initialize(config, model, client, zero_json(stage))
    scaler, before = NativeScalerWithGradNormCount(), whole_weights(engine)
    try:
        for step, (_, way, what) in enumerate(case):
            x, y = (tensor[8 * rank() : 8 * rank() + 8] for tensor in on_device(*batch(step)))
            for last in (False,) if what == 'drop' else (False, True):
                loss = cross_entropy(engine(x, way=way), y)
                scaler(loss * (float('nan') if what == 'nan' else 1), client, update_grad=last)
            if what == 'drop':
                client.zero_grad()
    except ConfigError as error:
        return [str(error).partition(':')[0]]
    after = whole_weights(engine)
    return sorted(n for n, p in after.items() if not torch.equal(p, before[n]))


def without_gradient(stage: int) -> None:
    """The second update's loss of rank 1 is detached."""
    model, client = make('sgd')
    engine, client = initialize(make_config(DATA__BATCH_SIZE=8), model, client, zero_json(stage))
    scaler = NativeScalerWithGradNormCount()
    for step in range(2):
        x, y = (tensor[8 * rank() : 8 * rank() + 8] for tensor in on_device(*batch(step)))
        loss = cross_entropy(engine(x, way='lr'), y)
        scaler(loss.detach() if (rank(), step) == (1, 1) else loss, client)
