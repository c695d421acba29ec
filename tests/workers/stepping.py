"""What ranks do in test_precision.py."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from internvl_ds import NativeScalerWithGradNormCount, get_grad_norm, initialize
from internvl_ds.comm import rank, world_size
from tests.workers.model import (
    batch,
    make_config,
    make_model,
    make_optimizer,
    micro_batch,
    precision_values,
    zero_json,
)


def reference(precision: str, steps: int, clip: float | None) -> dict[str, Any]:
    """A plain single-process loop on the whole batch; in bf16 with fp32 masters, as by hand."""
    master, low = make_model(), make_model()
    if precision == 'bf16':
        low = low.to(torch.bfloat16)
        # DeepSpeed takes its masters from the rounded weights.
        for m, p in zip(master.parameters(), low.parameters(), strict=True):
            m.data.copy_(p.data)
    else:
        low = master
    optimizer = make_optimizer(master)
    norms, losses = [], []
    for step in range(steps):
        x, y = batch(step)
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'autocast'):
            logits = low(x.to(low.stem.weight.dtype))
        loss = nn.functional.cross_entropy(logits.float(), y)
        loss.backward()
        trained = [
            (m, p)
            for m, p in zip(master.parameters(), low.parameters(), strict=True)
            if p.requires_grad
        ]
        for m, p in trained:
            m.grad = p.grad.float()
        norms.append(float(nn.utils.get_total_norm([m.grad for m, _ in trained])))
        if clip:
            nn.utils.clip_grad_norm_([m for m, _ in trained], clip)
        optimizer.step()
        losses.append(float(loss.detach()))
        for m, p in trained:
            p.data.copy_(m.data)
            m.grad = p.grad = None
    return {
        'norms': norms,
        'losses': losses,
        'weights': {n: p.detach().flatten().tolist() for n, p in master.named_parameters()},
    }


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


def follow_reference(
    stages: list[int],
    precision: str,
    steps: int,
    accumulation: int,
    clip: float | None,
) -> dict[str, Any]:
    """Trains at each stage; returns norms, losses and final masters by stage."""
    results = {}
    for stage in stages:
        config = make_config(
            DATA__BATCH_SIZE=16 // accumulation // world_size(),
            TRAIN__ACCUMULATION_STEPS=accumulation,
            **precision_values(precision),
        )
        model = make_model()
        engine, optimizer = initialize(config, model, make_optimizer(model), zero_json(stage))
        scaler = NativeScalerWithGradNormCount()
        norms, losses, off_boundary = [], [], []
        for step in range(steps):
            total = 0.0
            for micro in range(accumulation):
                x, y = micro_batch(step, micro, accumulation, rank(), world_size())
                x = x.to(torch.bfloat16 if precision == 'bf16' else torch.float32)
                loss = nn.functional.cross_entropy(engine(x).float(), y) / accumulation
                total += float(loss.detach())
                last = micro == accumulation - 1
                norm = scaler(
                    loss, optimizer, clip, parameters=model.parameters(), update_grad=last
                )
                if not last:
                    off_boundary.append(norm)
            norms.append(norm)
            losses.append(total)
        assert all(n is None for n in off_boundary)
        assert all(n.dim() == 0 and n.dtype == torch.float32 for n in norms)
        results[str(stage)] = {
            'norms': [float(n) for n in norms],
            'losses': losses,
            'weights': masters(engine),
            'applied': engine.global_steps - engine.skipped_steps,
        }
        engine.destroy()
    return results


def norms_before_step(stages: list[int], precision: str) -> dict[str, Any]:
    """get_grad_norm between backward and step, against the norm that the step reports."""
    results = {}
    for stage in stages:
        config = make_config(DATA__BATCH_SIZE=8, **precision_values(precision))
        model = make_model()
        engine, _ = initialize(config, model, make_optimizer(model), zero_json(stage))
        x, y = micro_batch(0, 0, 1, rank(), world_size())
        x = x.to(torch.bfloat16 if precision == 'bf16' else torch.float32)
        loss = nn.functional.cross_entropy(engine(x).float(), y)
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(loss, scale_wrt_gas=False)
        results[str(stage)] = {
            str(p): float(get_grad_norm(model.parameters(), float(p))) for p in ('1', '2', 'inf')
        }
        results[str(stage)]['head'] = float(get_grad_norm(model.head.weight))
        engine.step()
        try:
            get_grad_norm(model.parameters())
            results[str(stage)]['after'] = 'no error'
        except Exception as error:
            results[str(stage)]['after'] = str(error)
        engine.destroy()
    return results


def non_finite(stages: list[int], precision: str) -> dict[str, Any]:
    """A nan in one rank's loss only: skipped on all ranks, weights unchanged, then goes on."""
    results = {}
    for stage in stages:
        config = make_config(DATA__BATCH_SIZE=8, **precision_values(precision))
        model = make_model()
        client = make_optimizer(model)
        engine, optimizer = initialize(config, model, client, zero_json(stage))
        scaler = NativeScalerWithGradNormCount()

        def step(index: int, poison: bool) -> Any:
            x, y = micro_batch(index, 0, 1, rank(), world_size())
            x = x.to(torch.bfloat16 if precision == 'bf16' else torch.float32)
            loss = nn.functional.cross_entropy(engine(x).float(), y)
            if poison and rank() == 1:
                loss = loss * float('nan')
            return scaler(loss, optimizer, 1.0)

        step(0, False)
        before = masters(engine)
        norm = step(1, True)
        skipped, same = scaler.step_was_skipped, masters(engine) == before
        after = step(2, False)
        results[str(stage)] = {
            'norm': float(norm),
            'skipped': skipped,
            'unchanged': same,
            'next_norm': float(after),
            'next_skipped': scaler.step_was_skipped,
            'moved': masters(engine) != before,
            'counts': [engine.global_steps, engine.skipped_steps],
        }
        engine.destroy()
    return results
