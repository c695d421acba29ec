"""All that an engine's optimizer holds, by parameter name and whole, whatever the partitioning."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from internvl_ds.dist.rendezvous import rank, world_size

# name, index of the first element, the tensors ('master' among them), the numbers
Piece = tuple[str, int, dict[str, torch.Tensor], dict[str, float]]


def whole_state(engine: Any) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Parameter -> fp32 master, and what the optimizer keeps of it: tensors, and numbers.

    Every rank must call it, and gets all. The pieces come through DeepSpeed's own mappings, not
    through this package's.
    """
    everyone: list[Any] = [_own_pieces(engine)] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(everyone, everyone[0])
    masters, moments = {}, {}
    for name, p in engine.module.named_parameters():
        shape = getattr(p, 'ds_shape', p.shape)
        parts = [piece for ranks in everyone for piece in ranks if piece[0] == name]
        if not parts:
            continue
        whole: dict[str, torch.Tensor] = {}
        for key in parts[0][2]:
            flat = whole[key] = torch.full((shape.numel(),), float('nan'))
            for _, start, tensors, _ in parts:
                end = min(start + tensors[key].numel(), shape.numel())
                flat[start:end] = tensors[key][: end - start]
            assert not flat.isnan().any(), (name, key)
        numbers = [piece[3] for piece in parts]
        assert all(own == numbers[0] for own in numbers), (name, numbers)
        masters[name] = whole.pop('master').view(shape)
        moments[name] = {**{k: t.view(shape) for k, t in whole.items()}, **numbers[0]}
    return masters, moments


def _own_pieces(engine: Any) -> list[Piece]:
    """What this rank has of each parameter; at stage 0 rank 0 alone says it."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    pieces: list[Piece] = []
    for name, p in engine.module.named_parameters():
        if stage == 3:
            place = optimizer.grad_position.get(optimizer.get_param_id(p))
            if place is not None:
                group, at, size = (int(number) for number in place)
                flat = optimizer.fp32_partitioned_groups_flat[group]
                start = rank() * p.ds_tensor.ds_numel
                pieces.append(_piece(engine, name, start, flat, at, size))
        elif stage:
            mapping = getattr(p, '_hp_mapping', None)
            if mapping is None:
                continue
            fragment, start = mapping.hp_fragment, mapping.lp_fragment_address.start
            for flat in optimizer.single_partition_of_fp32_groups:
                at = (fragment.data_ptr() - flat.data_ptr()) // 4
                if 0 <= at < flat.numel():
                    pieces.append(_piece(engine, name, start, flat, at, fragment.numel()))
        elif rank() == 0:
            master = _master_at_stage_0(optimizer, p)
            if any(
                master is held for g in engine.basic_optimizer.param_groups for held in g['params']
            ):
                pieces.append(_piece(engine, name, 0, master, 0, master.numel()))
    return pieces


def _piece(engine: Any, name: str, start: int, flat: Any, at: int, size: int) -> Piece:
    state = engine.basic_optimizer.state.get(flat, {})
    held = {'master': flat, **{k: v for k, v in state.items() if _per_element(v, flat)}}
    tensors = {k: t.detach().float().reshape(-1)[at : at + size].clone() for k, t in held.items()}
    numbers = {k: float(v) for k, v in state.items() if k not in held and _is_number(v)}
    return name, start, tensors, numbers


def _per_element(value: Any, master: torch.Tensor) -> bool:
    """Adafactor's rows and columns are none."""
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape == master.shape


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and not value.dim())


def _master_at_stage_0(optimizer: Any, p: Any) -> Any:
    if hasattr(optimizer, 'fp32_groups'):
        for lows, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, master in zip(lows, masters, strict=True):
                if low is p:
                    return master
    return p
