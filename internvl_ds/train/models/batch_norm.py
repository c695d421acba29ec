"""Batch norm whose statistics are of the images of all ranks, on GPUs and CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from internvl_ds.errors import ConfigError

_STATISTICS = ('running_mean', 'running_var')
_MOMENTUM = 0.1  # the share of a batch in the running statistics


class SyncBatchNorm(_BatchNorm):
    """Normalizes each channel over the images of all ranks, which may have different numbers.

    In training mode a collective: every rank calls it. Without a process group, or on one rank, it
    is plain batch norm. torch's own ``nn.SyncBatchNorm`` refuses tensors on the CPU; names and
    shapes of parameters and buffers are its.

    It computes in float32 whatever the dtype of its input and weights, and the running statistics
    are in float32 also in a module that was cast to half precision.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(channels, eps, _MOMENTUM)
        for name in _STATISTICS:  # under zero.Init they were made in the engine's dtype
            self.register_buffer(name, getattr(self, name).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes (images, channels), any dtype; returns the same shape and dtype.

        Raises:
            ConfigError: when the running statistics were cast to half precision.
            ValueError: for one image in all, in training mode.
        """
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        assert self.num_batches_tracked is not None
        if mean.itemsize < 4:
            raise ConfigError(
                f'the running statistics of a batch norm are {mean.dtype}, in which small changes '
                'are lost: leave data_types.buffer_dtype out of the ds_config'
            )
        images, weight, bias = x.float(), self.weight.float(), self.bias.float()
        if self.training:
            self.num_batches_tracked.add_(1)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            options = self.training, _MOMENTUM, self.eps
            return F.batch_norm(images, mean, var, weight, bias, *options).to(x.dtype)
        batch_mean, batch_var, count = _statistics(images)
        with torch.no_grad():
            mean.lerp_(batch_mean, _MOMENTUM)
            var.lerp_(batch_var * (count / (count - 1)), _MOMENTUM)
        scale = torch.rsqrt(batch_var + self.eps) * weight
        return ((images - batch_mean) * scale + bias).to(x.dtype)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any batch of vectors is right."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        """Casts and moves, as ``half()`` and ``to()`` do; the statistics are moved alone."""
        kept = {name: self._buffers[name] for name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.itemsize < buffer.itemsize:
                self._buffers[name] = buffer.to(moved.device)
        return self


def _statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and variance (biased) of (images, channels) over all ranks, and the number of images.

    In two passes: a difference of squares loses digits where the mean is larger than the deviation.
    """
    total = _SumOverRanks.apply(torch.cat([x.sum(0), x.new_tensor([x.shape[0]])]))
    count = total[-1].detach()
    mean = total[:-1] / count
    return mean, _SumOverRanks.apply((x - mean).square().sum(0)) / count, count


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
