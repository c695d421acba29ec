"""Averages of tensors and numbers over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import deepspeed.comm as dist
import torch
import torch.distributed as torch_dist
from deepspeed.accelerator import get_accelerator

from internvl_ds.dist.peers import world_size


def reduce_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Averages a tensor over all ranks, of the same shape and dtype on each.

    Collective: every rank calls it.

    Args:
        tensor: any shape, dtype and device; left untouched.

    Returns:
        A new tensor of the same shape on the same device: the mean over ranks; float32 for integer
        input.
    """
    # NCCL knows tensors of its device only.
    total = tensor.detach().to(get_accelerator().current_device_name(), copy=True)
    if not total.is_floating_point() and not total.is_complex():
        total = total.to(torch.float32)
    if torch_dist.is_initialized():
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return (total / world_size()).to(tensor.device)


def reduce_tensors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Averages several tensors over all ranks at once. Collective: every rank calls it.

    Args:
        tensors: real, of any shapes, on one device; as many and the same shapes on every rank.

    Returns:
        New tensors of the same shapes: the means, computed in float32 and returned so for integers,
        in their own dtype for floating point.
    """
    if not tensors:
        return []
    flat = torch.cat([t.detach().reshape(-1).to(torch.float32) for t in tensors])
    means = reduce_tensor(flat).split([t.numel() for t in tensors])
    return [
        mean.view(t.shape).to(t.dtype if t.is_floating_point() else torch.float32)
        for mean, t in zip(means, tensors, strict=True)
    ]
