"""Bytes of weights, gradients and optimizer state, as DeepSpeed 0.19.8 allocates them. Pure.

What is said here of DeepSpeed is read in its runtime/zero/stage_1_and_2.py, stage3.py and
runtime/fp16/unfused_optimizer.py, and compared with what real ranks allocate in
tests/tools/plan/test_measured.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from internvl_ds.tools.plan.layout import Layout
from internvl_ds.tools.plan.sizes import Sizes
from internvl_ds.zero.sharded_build import ALWAYS, AUTO, LIMIT

FP32_BYTES = 4


@dataclass(frozen=True)
class Parts:
    """Bytes of one rank in one memory.

    Attributes:
        weights: what the module computes with, and its buffers.
        gradients: finished ones.
        optimizer: fp32 masters and moments.
        buffers: what DeepSpeed reduces, gathers and copies in.
        ema: the averaged weights.
        activations: all else that a forward and backward pass keeps.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0
    ema: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def kept(sizes: Sizes, layout: Layout, ema: bool) -> Parts:
    """What stays on the device from one update to the next, one rank's share."""
    weights = layout.weight_bytes * _elements_of_weights(sizes, layout) + _buffers(sizes, layout)
    masters = 0 if layout.optimizer_on_host else _masters(sizes, layout)
    moments = 0 if layout.optimizer_on_host else _moments(sizes, layout)
    gradients = buffers = 0
    if layout.stage == 3:
        buffers = bucket_bytes(layout)
        if not layout.optimizer_on_host:
            gradients = layout.gradient_bytes * shard(sizes, layout)
    if layout.optimizer_on_host and layout.stage < 3:
        buffers = layout.weight_bytes * sizes.largest  # temp_grad_buffer_for_gpu_offload
    average = 0 if layout.optimizer_on_host else _ema_shard(sizes, layout)
    return Parts(
        weights=weights,
        gradients=gradients,
        optimizer=masters + moments,
        buffers=buffers,
        ema=average + _ema_buffers(sizes) if ema else 0,
    )


def kept_on_host(sizes: Sizes, layout: Layout, ema: bool) -> Parts:
    """What stays in the host's memory under offload, one rank's share."""
    weights = gradients = optimizer = buffers = average = 0
    size, owned = layout.weight_bytes, shard(sizes, layout)
    groups = list(group_shards(sizes, layout))
    if layout.parameters_on_host:
        frozen = sum(math.ceil(n / layout.ranks) for n in sizes.frozen)
        # A flat buffer for each group is page-locked whatever the setting (stage3.py:906).
        weights = sum(_locked(size * n, layout, True) for n in groups)
        weights += _locked(size * frozen, layout, layout.parameters_pinned)
    if layout.optimizer_on_host:
        pinned = layout.optimizer_pinned
        masters = [FP32_BYTES * n for n in groups]
        gradients = sum(_locked(n, layout, pinned) for n in masters)
        if layout.stage == 3:
            # Beside the gradient of the masters, one in the accumulation dtype.
            gradients += _locked(layout.gradient_bytes * owned, layout, pinned)
        else:
            masters = [_locked(n, layout, pinned) for n in masters]
            buffers = sum(_locked(size * n, layout, pinned) for n in groups)
            buffers += _locked(size * sizes.largest, layout, pinned)
            if layout.stage == 2 and layout.accumulation > 1:
                gradients += size * owned
        optimizer = sum(masters) + _moments(sizes, layout)
        average = FP32_BYTES * owned if ema else 0
    return Parts(weights, gradients, optimizer, buffers, average)


def built_bytes(sizes: Sizes, layout: Layout, sharded_build: str) -> int:
    """In each rank's memory while the model is built, in float32.

    Args:
        sharded_build: TRAIN.SHARDED_BUILD.
    """
    whole, buffers = FP32_BYTES * sizes.parameters, FP32_BYTES * sizes.float_buffers
    sharded = sharded_build == ALWAYS or (sharded_build == AUTO and whole > LIMIT)
    if layout.stage == 3 and sharded:
        slices = sum(math.ceil(n / layout.ranks) for n in all_parameters(sizes))
        at_first = LIMIT if sharded_build == AUTO else 0  # until it is known that there are more
        largest = max(all_parameters(sizes))
        whole = max(FP32_BYTES * (slices + largest), at_first + FP32_BYTES * largest)
    return whole + buffers + sizes.other_buffers


def shard(sizes: Sizes, layout: Layout) -> int:
    """Trained elements that one rank owns, with DeepSpeed's padding."""
    return sum(group_shards(sizes, layout))


def checkpoint_bytes(sizes: Sizes, layout: Layout, ema: bool) -> int:
    """Bytes of tensors in a tag, the files of all ranks together."""
    weights = layout.weight_bytes * sizes.parameters + _buffers(sizes, layout)
    states = (1 + sizes.moments) * FP32_BYTES * sizes.trained
    if layout.stage == 0 and layout.weight_bytes == FP32_BYTES:
        states = sizes.moments * FP32_BYTES * sizes.trained  # the weights are the masters
    if layout.stage == 3:
        weights = layout.weight_bytes * sum(sizes.frozen) + _buffers(sizes, layout)
        states = (1 + sizes.moments) * FP32_BYTES * layout.ranks * shard(sizes, layout)
    # Each rank writes what it keeps, and at stage 0 each keeps the whole average.
    copies = layout.ranks if layout.stage == 0 else 1
    average = FP32_BYTES * sizes.trained * copies + _ema_buffers(sizes) if ema else 0
    return int(weights + states + average)


def all_parameters(sizes: Sizes) -> Iterable[int]:
    """Elements of each parameter, frozen ones included."""
    return (*(n for group in sizes.groups for n in group), *sizes.frozen)


def _elements_of_weights(sizes: Sizes, layout: Layout) -> int:
    """On the device between updates: padded at stages 1 and 2, a shard and small ones at 3."""
    if layout.stage == 0:
        return sizes.parameters
    if layout.stage < 3:
        return layout.ranks * shard(sizes, layout) + sum(sizes.frozen)
    shards = sum(math.ceil(n / layout.ranks) for n in all_parameters(sizes))
    whole = sum(n for n in all_parameters(sizes) if n <= layout.persistence)
    return whole + (0 if layout.parameters_on_host else shards)


def group_shards(sizes: Sizes, layout: Layout) -> Iterable[int]:
    """Elements of each group that one rank owns, padding included."""
    for group in sizes.groups:
        if layout.stage == 0:
            yield sum(group)
        elif layout.stage < 3:  # aligned to 2 elements for each rank
            yield 2 * math.ceil(sum(group) / (2 * layout.ranks))
        else:
            yield sum(math.ceil(n / layout.ranks) for n in group)


def _masters(sizes: Sizes, layout: Layout) -> int:
    """fp32 masters; under ZeRO beside fp32 weights too."""
    in_place = layout.stage == 0 and layout.weight_bytes == FP32_BYTES
    return 0 if in_place else FP32_BYTES * shard(sizes, layout)


def _moments(sizes: Sizes, layout: Layout) -> int:
    return int(sizes.moments * FP32_BYTES * shard(sizes, layout))


def _ema_shard(sizes: Sizes, layout: Layout) -> int:
    return FP32_BYTES * shard(sizes, layout)


def _ema_buffers(sizes: Sizes) -> int:
    return FP32_BYTES * sizes.float_buffers + sizes.other_buffers


def _buffers(sizes: Sizes, layout: Layout) -> int:
    """Of the module; the floating ones have the weights' dtype."""
    return layout.weight_bytes * sizes.float_buffers + sizes.other_buffers


def bucket_bytes(layout: Layout) -> int:
    """The reduce buckets, of their full size. Under autocast one for each of two dtypes."""
    if layout.stage == 3:
        return layout.bucket * ((2 + FP32_BYTES) if layout.in_autocast else layout.weight_bytes)
    size = layout.gradient_bytes if layout.stage == 1 else layout.weight_bytes
    count = (2 if layout.overlap else 1) * (2 if layout.in_autocast else 1)
    return layout.bucket * size * count


def _locked(size: int, layout: Layout, pinned: bool) -> int:
    """Bytes of host memory: torch rounds page-locked tensors up to a power of two."""
    return 1 << (size - 1).bit_length() if pinned and layout.on_gpu and size else size
