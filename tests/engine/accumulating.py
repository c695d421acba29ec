"""What ranks do in test_accumulation.py and test_zero_gradients.py, and plain loops like it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_checkpoint,
    save_checkpoint,
)
from internvl_ds.dist.rendezvous import rank, world_size
from tests.engine.stepping import masters
from tests.harness.calls import message_of
from tests.harness.model import (
    batch,
    make_config,
    make_model,
    make_sgd,
    micro_batch,
    module_dtype,
    precision_values,
)

_log = logging.getLogger('test')
EPOCHS, BATCHES, GROUP, CLIP = 2, 11, 3, 0.4


def zero_of(layout: str) -> dict[str, Any]:
    """The ds_config of 'zero0' to 'zero3', with the settings that its further words name."""
    zero: dict[str, Any] = {'stage': int(layout[4])}
    if zero['stage'] == 3:
        zero['stage3_param_persistence_threshold'] = 0
    if 'offload' in layout:
        zero['offload_optimizer'] = {'device': 'cpu'}
    if 'overlap' in layout:
        zero.update(overlap_comm=True, contiguous_gradients='copied' in layout)
    json = {'zero_optimization': zero, 'zero_force_ds_cpu_optimizer': False}
    return {**json, 'data_types': {'grad_accum_dtype': 'fp32'}} if 'fp32' in layout else json


def make_engine(layout: str, precision: str = 'fp32', group: int = GROUP, output: str = '') -> Any:
    """An engine of a layout with the small model and SGD; each micro-batch is a whole batch."""
    config = make_config(
        output, DATA__BATCH_SIZE=16 // world_size(), TRAIN__ACCUMULATION_STEPS=group,
        **precision_values(precision),
    )  # fmt: skip
    model = make_model()
    client = make_sgd(model)
    engine, optimizer = initialize(config, model, client, zero_of(layout))
    return config, engine, optimizer, client


# Where in an epoch the loop calls zero_grad, by the number of the micro-batch that follows.
DROPS: dict[str, Callable[[int], bool]] = {
    'epoch': lambda index: index == 0,
    'middle': lambda index: index in (0, 5),  # two of a group are dropped, by mistake
    'every': lambda index: True,
    'never': lambda index: False,
}


def plain(precision: str, where: str, batches: int = BATCHES) -> dict[str, Any]:
    """The original's loop in plain PyTorch, in one process on the whole batch.

    For an engine's bf16 with fp32 masters beside low-precision weights, as by hand.
    """
    dtype = module_dtype(precision)
    model, low = make_model(), make_model()
    if dtype == torch.float32:
        low = model
    low.to(dtype)
    pairs = [(m, p) for m, p in zip(model.parameters(), low.parameters(), strict=True)]
    for m, p in pairs:
        m.data.copy_(p.data)
    optimizer, norms = make_sgd(model), []
    for step in range(EPOCHS * batches):
        index = step % batches
        if DROPS[where](index):
            low.zero_grad()
        x, y = batch(step)
        (nn.functional.cross_entropy(low(x.to(dtype)).float(), y) / GROUP).backward()
        if (index + 1) % GROUP:
            continue
        for m, p in pairs:
            m.grad = None if p.grad is None else p.grad.float()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        low.zero_grad()
        for m, p in pairs:
            p.data.copy_(m.data)
    weights = {n: p.flatten().tolist() for n, p in model.named_parameters() if p.requires_grad}
    return {'norms': norms, 'weights': weights, 'updates': len(norms)}


def _epoch(
    engine: Any, optimizer: Any, scaler: Any, epoch: int, where: str, zero_grad: Any,
    batches: int = BATCHES,
) -> list[float]:  # fmt: skip
    """The same over an engine."""
    dtype, norms = next(engine.module.parameters()).dtype, []
    for index in range(batches):
        x, y = micro_batch(epoch * batches + index, 0, 1, rank(), world_size())
        if DROPS[where](index) and where != 'every':
            zero_grad()
        loss = nn.functional.cross_entropy(engine(x.to(dtype)).float(), y) / GROUP
        if where == 'every':  # where the original calls it without accumulation
            zero_grad()
        boundary = (index + 1) % GROUP == 0
        norm = scaler(loss, optimizer, CLIP, engine.parameters(), update_grad=boundary)
        if boundary:
            norms.append(float(norm))
            zero_grad()
    return norms


def drop(cells: list[tuple[str, str, str, str]]) -> list[dict[str, Any]]:
    """Two epochs in each (layout, precision, where, whose zero_grad)."""
    return [_drop(*cell) for cell in cells]


def _drop(layout: str, precision: str, where: str, whose: str) -> dict[str, Any]:
    _, engine, optimizer, client = make_engine(layout, precision)
    zero_grad: Any = {
        'optimizer': optimizer.zero_grad,
        'client': client.zero_grad,
        'engine': engine.zero_grad,
        'module': engine.module.zero_grad,
        'zeros': lambda: optimizer.zero_grad(set_to_none=False),
    }[whose]
    scaler, norms = NativeScalerWithGradNormCount(), []
    for epoch in range(EPOCHS):
        norms += _epoch(engine, optimizer, scaler, epoch, where, zero_grad)
    found = {'norms': norms, 'weights': masters(engine), 'updates': engine.global_steps}
    engine.destroy()
    return found


def save_in_the_middle(root: str, layouts: list[str]) -> dict[str, Any]:
    """A save with a remainder pending: the run that goes on, and one that resumes from it."""
    found = {}
    for layout in layouts:
        config, engine, optimizer, _ = make_engine(layout, output=f'{root}/{layout}')
        scaler = NativeScalerWithGradNormCount()
        first = _epoch(engine, optimizer, scaler, 0, 'epoch', optimizer.zero_grad)
        tag = save_checkpoint(config, 0, engine, 0.0, optimizer, None, scaler, _log)
        ways = []
        for resumed in (False, True):
            if resumed:
                engine.destroy()
                config, engine, optimizer, _ = make_engine(layout)
                config.defrost()
                config.MODEL.RESUME = tag
                scaler = NativeScalerWithGradNormCount()
                load_checkpoint(config, engine, optimizer, None, scaler, _log)
            norms = list(first)
            for epoch in range(1, EPOCHS):
                norms += _epoch(engine, optimizer, scaler, epoch, 'epoch', optimizer.zero_grad)
            ways.append({'norms': norms, 'weights': masters(engine),
                         'updates': engine.global_steps})  # fmt: skip
        engine.destroy()
        found[layout] = ways
    return found


def carry(layouts: list[str]) -> dict[str, Any]:
    """No zero_grad at an epoch's beginning: what the update with the remainder says and does."""
    found = {}
    for layout in layouts:
        _, engine, optimizer, _ = make_engine(layout)
        scaler = NativeScalerWithGradNormCount()
        _epoch(engine, optimizer, scaler, 0, 'never', lambda: None)
        before, count = masters(engine), engine.global_steps
        said = message_of(
            lambda e=engine, o=optimizer, s=scaler: _epoch(e, o, s, 1, 'never', lambda: None)
        )
        found[layout] = [said, masters(engine) == before, engine.global_steps == count]
        engine.destroy()
    return found


def wrong_setting(layouts: list[str]) -> dict[str, Any]:
    """A loop that accumulates 3 where 2 or 4 are configured, with zero_grad where it belongs."""
    found = {}
    for layout in layouts:
        for group in (2, 4):
            _, engine, optimizer, _ = make_engine(layout, group=group)
            scaler = NativeScalerWithGradNormCount()
            said = message_of(lambda e=engine, o=optimizer, s=scaler: _epoch(
                e, o, s, 0, 'epoch', o.zero_grad
            ))  # fmt: skip
            found[f'{layout} {group}'] = [said, engine.global_steps]
            engine.destroy()
    return found


class Branches(nn.Module):
    """With a branch that not every micro-batch takes."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return self.always(x) + self.sometimes(x) if both else self.always(x)


DROP = 2  # in a plan: zero_grad, and a micro-batch that does not take the branch


def _steps(plan: list[list[int]]) -> list[tuple[int, bool]]:
    return [(both, i + 1 == len(update)) for update in plan for i, both in enumerate(update)]


def branches(layouts: list[str], plans: list[list[list[int]]]) -> dict[str, Any]:
    """Norms and weights after updates whose micro-batches take the branch or not, by plan."""
    found = {}
    for layout in layouts:
        for plan in plans:
            torch.manual_seed(0)
            model, group = Branches(), len(plan[0])
            client = torch.optim.SGD(model.parameters(), lr=0.1)
            config = make_config(DATA__BATCH_SIZE=8, TRAIN__ACCUMULATION_STEPS=group)
            engine, optimizer = initialize(config, model, client, zero_of(layout))
            scaler, norms = NativeScalerWithGradNormCount(), []
            for step, (both, last) in enumerate(_steps(plan)):
                if both == DROP:
                    optimizer.zero_grad()
                x, y = micro_batch(step, 0, 1, rank(), world_size())
                loss = nn.functional.cross_entropy(engine(x, both == 1), y) / group
                norm = scaler(loss, optimizer, update_grad=last)
                norms += [float(norm)] if last else []
            found[f'{layout} {plan}'] = {'norms': norms, 'weights': masters(engine)}
            engine.destroy()
    return found


def plain_branches(plan: list[list[int]]) -> dict[str, Any]:
    """The same in plain PyTorch."""
    torch.manual_seed(0)
    model, group = Branches(), len(plan[0])
    optimizer, norms = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step, (both, last) in enumerate(_steps(plan)):
        if both == DROP:
            optimizer.zero_grad()
        x, y = batch(step)
        (nn.functional.cross_entropy(model(x, both == 1), y) / group).backward()
        if last:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), float('inf'))))
            optimizer.step()
            optimizer.zero_grad()
    weights = {n: p.flatten().tolist() for n, p in model.named_parameters()}
    return {'norms': norms, 'weights': weights}


def forwards_first(layouts: list[str]) -> dict[str, Any]:
    """Updates of two losses whose forwards both come before, and of forwards of the module."""
    found = {}
    for layout in layouts:
        for whose in ('engine', 'module'):
            _, engine, optimizer, _ = make_engine(layout, group=2)
            model = engine if whose == 'engine' else engine.module
            scaler, norms = NativeScalerWithGradNormCount(), []
            for step in range(2):
                parts = [micro_batch(2 * step + i, 0, 1, rank(), world_size()) for i in (0, 1)]
                if whose == 'engine':
                    losses = [nn.functional.cross_entropy(model(x), y) / 2 for x, y in parts]
                for i, (x, y) in enumerate(parts):
                    loss = (
                        losses[i] if whose == 'engine'
                        else nn.functional.cross_entropy(model(x), y) / 2
                    )  # fmt: skip
                    norm = scaler(loss, optimizer, CLIP, update_grad=i == 1)
                norms.append(float(norm))
            found[f'{layout} {whose}'] = {'norms': norms, 'weights': masters(engine)}
            engine.destroy()
    return found


def plain_forwards_first() -> dict[str, Any]:
    """The same in plain PyTorch."""
    model = make_model()
    optimizer, norms = make_sgd(model), []
    for step in range(2):
        parts = [batch(2 * step + i) for i in (0, 1)]
        for loss in [nn.functional.cross_entropy(model(x), y) / 2 for x, y in parts]:
            loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    weights = {n: p.flatten().tolist() for n, p in model.named_parameters() if p.requires_grad}
    return {'norms': norms, 'weights': weights}
