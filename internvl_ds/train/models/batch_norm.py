"""Batch norm whose statistics are of the images of all ranks, on GPUs and CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import deepspeed.comm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from internvl_ds.dist.reduce import reduce_tensors
from internvl_ds.errors import ConfigError, few

_STATISTICS = ('running_mean', 'running_var')
_SAME_NUMBERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)


class SyncBatchNorm(_BatchNorm):
    """Normalizes each channel over the images of all ranks, which may have different numbers.

    It has the settings of torch's batch norms, and for those that `synchronize` makes of timm's,
    their ``drop`` and ``act``.

    In training mode a collective: every rank calls it. Without a process group, or on one rank, it
    is plain batch norm. torch's own ``nn.SyncBatchNorm`` refuses tensors on the CPU; names and
    shapes of parameters and buffers are its.

    It computes in float32 whatever the dtype of its input and weights, and the running statistics
    are in float32 also in a module that was cast to half precision.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps)
        for name in _STATISTICS:  # under zero.Init they were made in the engine's dtype
            self.register_buffer(name, getattr(self, name).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes (images, channels, ...), any dtype; returns the same shape and dtype.

        Raises:
            ConfigError: when the running statistics were cast to half precision.
            ValueError: for one value of a channel in all, in training mode.
        """
        x = self._normalized(x)
        for name in ('drop', 'act'):  # of timm's layers
            following = self._modules.get(name)
            x = x if following is None else following(x)
        return x

    def _normalized(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.running_mean, self.running_var
        if mean is not None and mean.itemsize < 4:
            raise ConfigError(
                f'the running statistics of a batch norm are {mean.dtype}, in which small changes '
                'are lost: leave data_types.buffer_dtype out of the ds_config'
            )
        images = x.float()
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        momentum = self.momentum or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean of all batches so far
                momentum = 1.0 / float(self.num_batches_tracked)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            options = self.training or mean is None, momentum, self.eps
            return F.batch_norm(images, mean, var, weight, bias, *options).to(x.dtype)
        batch_mean, batch_var, count = _statistics(images)
        if mean is not None and var is not None:
            with torch.no_grad():
                mean.lerp_(batch_mean, momentum)
                var.lerp_(batch_var * (count / (count - 1)), momentum)
        scale = torch.rsqrt(batch_var + self.eps)
        scale = scale if weight is None else scale * weight
        scaled = (images - _wide(batch_mean, x)) * _wide(scale, x)
        return (scaled if bias is None else scaled + _wide(bias, x)).to(x.dtype)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any batch with channels is right."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        """Casts and moves, as ``half()`` and ``to()`` do; the statistics are moved alone."""
        statistics = {name: self._buffers[name] for name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, buffer in statistics.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.itemsize < buffer.itemsize:
                self._buffers[name] = buffer.to(moved.device)
        return self


def synchronize(model: nn.Module) -> int:
    """Makes every batch norm of a model a `SyncBatchNorm`, in place; returns how many there are.

    Parameters, buffers and their names stay as they are.

    Raises:
        ConfigError: for one whose forward pass is not known here.
    """
    norms = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm)
    ]
    strange = [f'{name} ({type(m).__name__})' for name, m in norms if type(m) not in _SAME_NUMBERS]
    if strange:
        raise ConfigError(
            f'MODEL.SYNC_BN: {few(strange)}: no batch norm of torch or timm, so what it computes '
            'is not known; set it to False, and have the model make nn.SyncBatchNorm'
        )
    for _, module in norms:
        module.__class__ = SyncBatchNorm
    return len(norms)


@torch.no_grad()
def distribute_statistics(buffers: Iterable[tuple[str, torch.Tensor]], how: str) -> None:
    """Makes the running statistics of batch norms those of all ranks, in place, as timm does.

    Collective: every rank calls it.

    Args:
        buffers: the buffers of a module, by name.
        how: 'reduce' (the mean over ranks), 'broadcast' (those of rank 0), '' (as they are).
    """
    named = [tensor for name, tensor in buffers if name.rpartition('.')[2] in _STATISTICS]
    if not how or not named or not dist.is_initialized():
        return
    if how == 'reduce':
        torch._foreach_copy_(named, reduce_tensors(named))
        return
    for tensor in named:
        deepspeed.comm.broadcast(tensor, 0)


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and variance (biased) of each channel over all ranks, and the number of its values.

    In two passes: a difference of squares loses digits where the mean is larger than the deviation.
    """
    others = [0, *range(2, x.dim())]
    total = _SumOverRanks.apply(torch.cat([x.sum(others), x.new_tensor([x.numel() // x.shape[1]])]))
    count = total[-1].detach()
    mean = total[:-1] / count
    squares = (x - _wide(mean, x)).square().sum(others)
    return mean, _SumOverRanks.apply(squares) / count, count


def _wide(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A value of each channel, to go with (images, channels, ...)."""
    return values.view(-1, *[1] * (x.dim() - 2))


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; so is the gradient, as each rank's loss has it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _summed(gradient)


def _summed(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
