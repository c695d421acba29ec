"""Bytes of weights, gradients and optimizer state, as DeepSpeed 0.19.8 allocates them. Pure.

The facts about DeepSpeed are read in its runtime/zero/stage_1_and_2.py, stage3.py and
runtime/fp16/unfused_optimizer.py, and compared with what real ranks allocate in
tests/tools/plan/test_measured.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from internvl_ds.dist.device import locked_bytes
from internvl_ds.tools.plan.sizes import Sizes
from internvl_ds.tools.plan.zero_scheme import ZeroScheme
from internvl_ds.zero.sharded_build import ALWAYS, AUTO, LIMIT

FP32_BYTES = 4


@dataclass(frozen=True)
class Parts:
    """Bytes of one rank in one memory."""

    weights: int = 0  # what the module computes with, and its buffers
    gradients: int = 0  # finished ones
    optimizer: int = 0  # fp32 masters and moments
    buffers: int = 0  # what DeepSpeed reduces, gathers and copies in
    ema: int = 0  # the averaged weights
    activations: int = 0  # all else that a forward and backward pass keeps

    @property
    def total(self) -> int:
        """The sum."""
        return sum(vars(self).values())


def static_parts(sizes: Sizes, scheme: ZeroScheme, ema: bool) -> Parts:
    """The bytes of one rank that stay on the device from one update to the next."""
    weights = scheme.weight_bytes * _elements_of_weights(sizes, scheme) + _buffers(sizes, scheme)
    elements = shard(sizes, scheme)
    gradients = optimizer = average = 0
    if not scheme.optimizer_on_host:
        # Under ZeRO there are fp32 masters beside fp32 weights too.
        in_place = scheme.stage == 0 and scheme.weight_bytes == FP32_BYTES
        optimizer = (0 if in_place else FP32_BYTES * elements) + _moments(sizes, scheme)
        gradients = scheme.gradient_bytes * elements if scheme.stage == 3 else 0
        average = FP32_BYTES * elements
    buffers = bucket_bytes(scheme) if scheme.stage == 3 else 0
    if scheme.optimizer_on_host and scheme.stage < 3:
        buffers = scheme.weight_bytes * sizes.largest  # temp_grad_buffer_for_gpu_offload
    average = average + _ema_buffers(sizes) if ema else 0
    return Parts(weights, gradients, optimizer, buffers, average)


def static_host_parts(sizes: Sizes, scheme: ZeroScheme, ema: bool) -> Parts:
    """The bytes of one rank that stay in the host's memory under offload."""
    weights = gradients = optimizer = buffers = average = 0
    size, elements = scheme.weight_bytes, shard(sizes, scheme)
    groups = list(group_shards(sizes, scheme))
    if scheme.parameters_on_host:
        frozen = sum(math.ceil(n / scheme.ranks) for n in sizes.frozen)
        # A flat buffer for each group is page-locked whatever the setting (stage3.py:906).
        weights = sum(_locked(size * n, scheme, True) for n in groups)
        weights += _locked(size * frozen, scheme, scheme.parameters_pinned)
    if scheme.optimizer_on_host:
        pinned = scheme.optimizer_pinned
        masters = [FP32_BYTES * n for n in groups]
        gradients = sum(_locked(n, scheme, pinned) for n in masters)
        if scheme.stage == 3:
            # Beside the gradient of the masters, one in the accumulation dtype.
            gradients += _locked(scheme.gradient_bytes * elements, scheme, pinned)
        else:
            masters = [_locked(n, scheme, pinned) for n in masters]
            buffers = sum(_locked(size * n, scheme, pinned) for n in groups)
            buffers += _locked(size * sizes.largest, scheme, pinned)
            if scheme.stage == 2 and scheme.accumulation > 1:
                gradients += size * elements
        optimizer = sum(masters) + _moments(sizes, scheme)
        average = FP32_BYTES * elements if ema else 0
    return Parts(weights, gradients, optimizer, buffers, average)


def module_bytes(module: nn.Module, size: int) -> int:
    """Bytes of a module that each rank has whole, with ``size`` bytes a floating element."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * (size if t.is_floating_point() else t.element_size()) for t in tensors)


def built_bytes(sizes: Sizes, scheme: ZeroScheme, sharded_build: str) -> int:
    """In each rank's memory while the model is built, in float32.

    Args:
        sharded_build: TRAIN.SHARDED_BUILD.
    """
    whole, buffers = FP32_BYTES * sizes.parameters, FP32_BYTES * sizes.float_buffers
    sharded = sharded_build == ALWAYS or (sharded_build == AUTO and whole > LIMIT)
    if scheme.stage == 3 and sharded:
        slices = sum(math.ceil(n / scheme.ranks) for n in all_parameters(sizes))
        at_first = LIMIT if sharded_build == AUTO else 0  # until it is known that there are more
        largest = max(all_parameters(sizes))
        whole = max(FP32_BYTES * (slices + largest), at_first + FP32_BYTES * largest)
    return whole + buffers + sizes.other_buffers


def shard(sizes: Sizes, scheme: ZeroScheme) -> int:
    """Trained elements that one rank owns, with DeepSpeed's padding."""
    return sum(group_shards(sizes, scheme))


def checkpoint_bytes(sizes: Sizes, scheme: ZeroScheme, ema: bool) -> int:
    """Bytes of tensors in a tag, the files of all ranks together."""
    elements, states = sizes.parameters, (1 + sizes.moments) * FP32_BYTES * sizes.trained
    if scheme.stage == 0 and scheme.weight_bytes == FP32_BYTES:
        states = sizes.moments * FP32_BYTES * sizes.trained  # the weights are the masters
    if scheme.stage == 3:
        elements = sum(sizes.frozen)
        states = (1 + sizes.moments) * FP32_BYTES * scheme.ranks * shard(sizes, scheme)
    weights = scheme.weight_bytes * elements + _buffers(sizes, scheme)
    # Each rank writes what it keeps, and at stage 0 each keeps the whole average.
    copies = scheme.ranks if scheme.stage == 0 else 1
    average = FP32_BYTES * sizes.trained * copies + _ema_buffers(sizes) if ema else 0
    return int(weights + states + average)


def snapshot_bytes(sizes: Sizes, scheme: ZeroScheme, ema: bool, on_host: int) -> int:
    """Bytes that CHECKPOINT.ASYNC copies into the memory of rank 0's host.

    Args:
        on_host: ranks of the host.
    """
    size, on_ranks = scheme.weight_bytes, scheme.ranks if scheme.stage == 3 else 1
    of_each = [FP32_BYTES * n for group in sizes.groups for n in group]
    of_groups = [FP32_BYTES * n for n in group_shards(sizes, scheme)]
    if scheme.stage == 0 and size == FP32_BYTES:  # the weights are the masters
        states = sizes.moments * _copied(of_each, scheme)
    else:
        states = (1 + sizes.moments) * _copied(of_groups, scheme)
    average = _copied(of_groups if scheme.stage else of_each, scheme) if ema else 0
    frozen = _copied([size * math.ceil(n / on_ranks) for n in sizes.frozen], scheme)
    if scheme.stage == 3:
        states, first = states + frozen, 0
    else:
        first = frozen + _copied([n // FP32_BYTES * size for n in of_each], scheme)
    first += _buffers(sizes, scheme) + (_ema_buffers(sizes) if ema else 0)
    saving = on_host if scheme.stage else 1  # at stage 0 rank 0 saves what all hold
    return int(first + saving * states + on_host * average)


def _copied(tensors: Iterable[int], scheme: ZeroScheme) -> int:
    """Bytes of the copies of tensors, page-locked beside a GPU."""
    return sum(_locked(size, scheme, True) for size in tensors)


def all_parameters(sizes: Sizes) -> Iterable[int]:
    """Elements of each parameter, frozen ones included."""
    return (*(n for group in sizes.groups for n in group), *sizes.frozen)


def _elements_of_weights(sizes: Sizes, scheme: ZeroScheme) -> int:
    """Elements on the device between updates: padded at stages 1 and 2; a shard at 3."""
    if scheme.stage == 0:
        return sizes.parameters
    if scheme.stage < 3:
        return scheme.ranks * shard(sizes, scheme) + sum(sizes.frozen)
    shards = sum(math.ceil(n / scheme.ranks) for n in all_parameters(sizes))
    whole = sum(n for n in all_parameters(sizes) if n <= scheme.persistence)
    return whole + (0 if scheme.parameters_on_host else shards)


def group_shards(sizes: Sizes, scheme: ZeroScheme) -> Iterable[int]:
    """Elements of each group that one rank owns, padding included."""
    for group in sizes.groups:
        if scheme.stage == 0:
            yield sum(group)
        elif scheme.stage < 3:  # aligned to 2 elements for each rank
            yield 2 * math.ceil(sum(group) / (2 * scheme.ranks))
        else:
            yield sum(math.ceil(n / scheme.ranks) for n in group)


def _moments(sizes: Sizes, scheme: ZeroScheme) -> int:
    return int(sizes.moments * FP32_BYTES * shard(sizes, scheme))


def _ema_buffers(sizes: Sizes) -> int:
    return FP32_BYTES * sizes.float_buffers + sizes.other_buffers


def _buffers(sizes: Sizes, scheme: ZeroScheme) -> int:
    """Bytes of the module's buffers; floating buffers have the weights' dtype."""
    return scheme.weight_bytes * sizes.float_buffers + sizes.other_buffers


def bucket_bytes(scheme: ZeroScheme) -> int:
    """The reduce buckets, of their full size. Under autocast one for each of two dtypes."""
    if scheme.stage == 3:
        return scheme.bucket * ((2 + FP32_BYTES) if scheme.in_autocast else scheme.weight_bytes)
    size = scheme.gradient_bytes if scheme.stage == 1 else scheme.weight_bytes
    count = (2 if scheme.overlap else 1) * (2 if scheme.in_autocast else 1)
    return scheme.bucket * size * count


def _locked(size: int, scheme: ZeroScheme, pinned: bool) -> int:
    """Bytes of host memory for a tensor; of page-locked ones torch takes more."""
    return locked_bytes(size) if pinned and scheme.on_gpu else size
