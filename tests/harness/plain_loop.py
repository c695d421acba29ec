"""The loop that the bridge stands for: plain PyTorch, one process, the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.harness.model import batch, make_model, make_optimizer, make_sgd, module_dtype


def reference(
    precision: str,
    steps: int,
    clip: float | None,
    scale: float = 2.0**16,
    first: int = 0,
    growth: int = 2000,
    sgd: bool = False,
) -> dict[str, Any]:
    """Trains with autocast, GradScaler, clip_grad_norm_ and AdamW, as the original does.

    For an engine's bf16 and fp16 with fp32 masters beside low-precision weights, as by hand.

    Args:
        scale, growth: GradScaler's first one, and its growth_interval, in float16.
        first: the first batch.
    """
    dtype = module_dtype(precision)
    master, low = make_model(), make_model()
    if dtype != torch.float32:
        low = low.to(dtype)
        # DeepSpeed takes its masters from the rounded weights.
        for m, p in zip(master.parameters(), low.parameters(), strict=True):
            m.data.copy_(p.data)
    else:
        low = master
    optimizer = make_sgd(master) if sgd else make_optimizer(master)
    scaler = torch.amp.GradScaler(
        'cpu', init_scale=scale, growth_interval=growth, enabled='fp16' in precision
    )
    amp = torch.bfloat16 if 'bf16' in precision else torch.float16
    trained = [
        (m, p)
        for m, p in zip(master.parameters(), low.parameters(), strict=True)
        if p.requires_grad
    ]
    found: dict[str, list[float]] = {'norms': [], 'losses': [], 'scales': []}
    for step in range(first, first + steps):
        x, y = batch(step)
        with torch.autocast('cpu', amp, enabled='autocast' in precision):
            logits = low(x.to(dtype))
        loss = nn.functional.cross_entropy(logits.float(), y)
        scaler.scale(loss).backward()
        for m, p in trained:
            m.grad = p.grad.float()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_([m for m, _ in trained], clip or float('inf'))
        scaler.step(optimizer)
        scaler.update()
        found['norms'].append(float(norm))
        found['losses'].append(float(loss.detach()))
        found['scales'].append(scaler.get_scale())
        for m, p in trained:
            p.data.copy_(m.data)
            m.grad = p.grad = None
    weights = {n: p.detach().flatten().tolist() for n, p in master.named_parameters()}
    return {**found, 'weights': weights}
