"""What ranks do in test_precision.py."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from internvl_ds import NativeScalerWithGradNormCount, get_grad_norm, initialize
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.errors import ConfigError
from tests.harness.counts import share
from tests.harness.model import (
    make_config,
    make_model,
    make_optimizer,
    make_sgd,
    micro_batch,
    module_dtype,
    precision_values,
    zero_json,
)

NORMS = ('0.5', '1', '2', '3', 'inf')


def masters(engine: Any) -> dict[str, list[float]]:
    """Name -> fp32 master weight, gathered."""
    optimizer, found = engine.optimizer, {}
    lows = {}
    if hasattr(optimizer, 'fp32_groups'):
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            lows.update({id(p): m for p, m in zip(low, high, strict=True)})
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in lows:
            value = lows[id(p)]
        elif engine.zero_optimization_stage() == 0:
            value = p
        else:
            value = safe_get_full_fp32_param(p)
        found[name] = value.detach().flatten().tolist()
    return found


def make_engine(
    stage: int,
    precision: str,
    accumulation: int = 1,
    fp16: dict[str, Any] | None = None,
    sgd: bool = False,
    **more: Any,
) -> tuple[Any, Any]:
    """An engine of the small model on the whole batch, and its optimizer."""
    config = make_config(
        DATA__BATCH_SIZE=16 // accumulation // world_size(),
        TRAIN__ACCUMULATION_STEPS=accumulation,
        **precision_values(precision),
        **more,
    )
    json = zero_json(stage)
    if fp16:
        json['fp16'] = {'enabled': 'auto', **fp16}
    model = make_model()
    client = make_sgd(model) if sgd else make_optimizer(model)
    return initialize(config, model, client, json)


def train_step(
    engine: Any, optimizer: Any, scaler: Any, step: int, clip: float | None = None,
    accumulation: int = 1, poison: float | None = None,
) -> tuple[Any, float, list[Any]]:  # fmt: skip
    """One update on the whole batch of a step.

    Args:
        poison: what rank 1 multiplies its gradient by; its loss is as it is.

    Returns:
        The norm, this rank's mean loss, and what the calls off the boundary returned.
    """
    total, off = 0.0, []
    dtype = next(engine.module.parameters()).dtype
    for micro in range(accumulation):
        x, y = micro_batch(step, micro, accumulation, rank(), world_size())
        loss = nn.functional.cross_entropy(engine(x.to(dtype)).float(), y) / accumulation
        total += float(loss.detach())
        if poison is not None and rank() == 1:
            loss.register_hook(lambda grad: grad * poison)
        last = micro == accumulation - 1
        norm = scaler(loss, optimizer, clip, engine.module.parameters(), update_grad=last)
        if not last:
            off.append(norm)
    return norm, total, off


def follow_reference(
    stages: list[int],
    precision: str,
    steps: int,
    accumulations: list[int],
    clips: list[float | None],
    fp16: dict[str, Any] | None = None,
    sgd: bool = False,
    one_of: int = 1,
) -> dict[str, Any]:
    """Trains in every cell; returns norms, losses, loss scales and final masters of each.

    Args:
        one_of: trains in each of so many cells only, without --soak.
    """
    results = {}
    for stage, accumulation, clip in share(itertools.product(stages, accumulations, clips), one_of):
        engine, optimizer = make_engine(stage, precision, accumulation, fp16, sgd)
        scaler = NativeScalerWithGradNormCount()
        norms, losses, scales, skipped = [], [], [], []
        for step in range(steps):
            norm, loss, off = train_step(engine, optimizer, scaler, step, clip, accumulation)
            assert all(n is None for n in off)
            assert norm.dim() == 0
            assert norm.dtype == torch.float32
            norms.append(float(norm))
            losses.append(loss)
            scales.append(scaler.loss_scale)
            skipped.append(scaler.step_was_skipped)
        results[f'{stage} {accumulation} {clip}'] = {
            'norms': norms,
            'losses': losses,
            'scales': scales,
            'skipped': skipped,
            'weights': masters(engine),
            'applied': engine.global_steps - engine.skipped_steps,
        }
        engine.destroy()
    return results


def freeze_in_between(stages: list[int], precision: str) -> dict[str, Any]:
    """Two updates, one with a layer frozen that was trained, and two more as before."""
    results = {}
    for stage in stages:
        engine, optimizer = make_engine(stage, precision)
        scaler = NativeScalerWithGradNormCount()
        for step in range(2):
            train_step(engine, optimizer, scaler, step, 0.5)
        before = masters(engine)
        engine.module.body.requires_grad_(False)
        said = None
        try:
            train_step(engine, optimizer, scaler, 2, 0.5)
        except ConfigError as error:
            said = str(error)
        engine.module.body.requires_grad_(True)
        after = masters(engine)
        for step in range(2, 4):
            train_step(engine, optimizer, scaler, step, 0.5)
        moved = {name for name in before if after[name] != before[name]}
        results[str(stage)] = {'said': said, 'moved': sorted(moved), 'weights': masters(engine)}
        engine.destroy()
    return results


def norms_before_step(stages: list[int], precision: str) -> dict[str, Any]:
    """get_grad_norm between backward and step, of all parameters, of one, of some."""
    results = {}
    for stage in stages:
        engine, _ = make_engine(stage, precision)
        model = engine.module
        x, y = micro_batch(0, 0, 1, rank(), world_size())
        loss = nn.functional.cross_entropy(engine(x.to(module_dtype(precision))).float(), y)
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(wrapper_of(engine).scale_loss(loss), scale_wrt_gas=False)
        some = [p for n, p in model.named_parameters() if n.startswith(('norm', 'body', 'frozen'))]
        results[str(stage)] = {
            **{p: float(get_grad_norm(model.parameters(), float(p))) for p in NORMS},
            'head': float(get_grad_norm(model.head.weight)),
            **{f'some {p}': float(get_grad_norm(some, float(p))) for p in NORMS},
        }
        engine.step()
        try:
            get_grad_norm(model.parameters())
            results[str(stage)]['after'] = 'no error'
        except Exception as error:
            results[str(stage)]['after'] = str(error)
        engine.destroy()
    return results


def norms_with_an_unfrozen_layer(stages: list[int]) -> dict[str, Any]:
    """(get_grad_norm of all parameters, the norm that DeepSpeed clips by) of three updates."""
    results = {}
    for stage in stages:
        engine, _ = make_engine(stage, 'fp32')
        engine.module.frozen.requires_grad_(True)
        found = results[str(stage)] = []
        for step in range(3):
            x, y = micro_batch(step, 0, 1, rank(), world_size())
            loss = nn.functional.cross_entropy(engine(x), y)
            engine.set_gradient_accumulation_boundary(True)
            engine.backward(loss, scale_wrt_gas=False)
            norm = get_grad_norm(engine.module.parameters())
            engine.step()
            found.append([float(norm), float(engine.get_global_grad_norm())])
        engine.destroy()
    return results


def non_finite(stages: list[int], precision: str, value: str) -> dict[str, Any]:
    """An inf or nan in one rank's loss only, in one update; what all ranks make of it."""
    results = {}
    for stage in stages:
        scale = {'initial_scale_power': 4} if 'fp16' in precision else None
        engine, optimizer = make_engine(stage, precision, fp16=scale)
        scaler = NativeScalerWithGradNormCount()
        train_step(engine, optimizer, scaler, 0, 1.0)
        before, first = masters(engine), scaler.loss_scale
        norm, _, _ = train_step(engine, optimizer, scaler, 1, 1.0, poison=float(value))
        skipped, after = scaler.step_was_skipped, masters(engine)
        scale_after = scaler.loss_scale
        next_norm, _, _ = train_step(engine, optimizer, scaler, 2, 1.0)
        results[str(stage)] = {
            'norm': float(norm),
            'skipped': skipped,
            'unchanged': after == before,
            'scales': [first, scale_after, scaler.loss_scale],
            'next_norm': float(next_norm),
            'next_skipped': scaler.step_was_skipped,
            'moved': masters(engine) != before,
            'counts': [engine.global_steps, engine.skipped_steps],
        }
        engine.destroy()
    return results
