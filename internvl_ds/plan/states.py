"""Bytes of weights, gradients and optimizer state, as DeepSpeed 0.19.8 allocates them. Pure.

What is said here of DeepSpeed is read in its runtime/zero/stage_1_and_2.py, stage3.py and
runtime/fp16/unfused_optimizer.py, and compared with what real ranks allocate in
tests/test_plan_measured.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from internvl_ds.plan.activations import Timeline
from internvl_ds.plan.layout import DEFAULT_BUCKET, Layout
from internvl_ds.plan.sizes import Sizes

_FP32 = 4


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
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.buffers
            + self.ema
            + self.activations
        )


def kept(sizes: Sizes, layout: Layout, ema: bool) -> Parts:
    """What stays on the device from one update to the next, one rank's share."""
    weights = layout.weight_bytes * _elements_of_weights(sizes, layout) + _buffers(sizes, layout)
    masters = 0 if layout.optimizer_on_host else _masters(sizes, layout)
    moments = 0 if layout.optimizer_on_host else _moments(sizes, layout)
    gradients = buffers = 0
    if layout.stage == 3:
        buffers = _buckets(layout)
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
    owned = shard(sizes, layout)
    if layout.parameters_on_host:
        frozen = sum(math.ceil(n / layout.ranks) for n in sizes.frozen)
        # A flat buffer for each group is page-locked whatever the setting (stage3.py:906).
        weights = sum(
            _locked(layout.weight_bytes * n, True) for n in _group_shards(sizes, layout)
        ) + _locked(layout.weight_bytes * frozen, layout.parameters_pinned)
    if layout.optimizer_on_host:
        pinned = layout.optimizer_pinned
        groups = list(_group_shards(sizes, layout))
        optimizer = _masters(sizes, layout) + _moments(sizes, layout)
        # The gradient of the masters, beside one in the accumulation dtype.
        gradients = sum(_locked(_FP32 * n, pinned) for n in groups)
        if layout.stage < 3:
            optimizer = _moments(sizes, layout) + sum(_locked(_FP32 * n, pinned) for n in groups)
            copies = sum(_locked(layout.weight_bytes * n, pinned) for n in groups)
            largest = _locked(layout.weight_bytes * sizes.largest, pinned)
            buffers = copies + largest
            if layout.accumulation > 1:
                gradients += layout.weight_bytes * owned
        else:
            gradients += _locked(layout.gradient_bytes * owned, pinned)
        average = _ema_shard(sizes, layout) if ema else 0
    return Parts(weights, gradients, optimizer, buffers, average)


def shard(sizes: Sizes, layout: Layout) -> int:
    """Trained elements that one rank owns, with DeepSpeed's padding."""
    return sum(_group_shards(sizes, layout))


def in_backward(sizes: Sizes, layout: Layout, step: Timeline) -> Parts:
    """What is on the device beside `kept` when forward and backward need most.

    Args:
        step: of the layout's micro-batch. Its gradients are whole ones, in the weights' dtype.
    """
    if layout.stage == 3:
        return _in_backward_of_shards(sizes, layout, step)
    active, done = step.activations, step.gradients
    size, whole = layout.weight_bytes, layout.weight_bytes * sizes.trained
    buckets = _buckets(layout) if layout.stage else 0
    copied, owned = _copied(sizes, layout), _owned_gradients(sizes, layout)
    reducing = np.zeros_like(active)  # the copy of a bucket, while it is reduced
    if layout.stage < 2 and layout.accumulation > 1:
        held = np.full_like(done, whole)
    elif layout.stage == 0 or (layout.stage == 1 and not layout.overlap):
        held = done
    else:
        # The whole room for a rank's gradients is made when the first bucket is reduced.
        earlier = owned if layout.accumulation > 1 else 0
        held = np.where(done >= size * layout.bucket, owned, 0) + earlier
        reducing = np.where(_reduces(step, layout), copied, 0)
    passing = _at_peak(active, held, buckets + reducing)
    # After the backward pass the rest is reduced, from the buckets that hold a part of it.
    left = float(whole) if layout.stage == 0 else held[-1]
    if layout.stage == 1 and held[-1] > owned:
        left = whole - size * min(layout.bucket, sizes.trained) + owned
    elif layout.stage and not reducing.any():
        left += owned
    return max(passing, Parts(gradients=int(left), buffers=buckets + copied), key=_total)


def _in_backward_of_shards(sizes: Sizes, layout: Layout, step: Timeline) -> Parts:
    """Stage 3: weights are gathered before they are used, and some stay until they are again."""
    scattered = [n for n in _all_parameters(sizes) if n > layout.persistence]
    elements, size = sum(scattered), layout.weight_bytes
    ahead = min(elements, layout.prefetch + sizes.largest_module)
    # Between forward and backward those are whole whose two uses lie within the distance.
    whole = min(elements, layout.reuse_distance // 2 + ahead)
    # What is gathered at a time is there twice, until the last of it is used: once as it was
    # sent, under autocast in half precision.
    sent = 2 if layout.in_autocast else size
    gathered = np.full_like(step.activations, size * whole)
    gathered[: step.forward] += sent * ahead
    gathered[step.forward :] += sent * min(ahead, elements - whole)
    reducing = np.where(_reduces(step, layout), _copied(sizes, layout), 0)
    passing = _at_peak(step.activations, np.zeros_like(gathered), gathered + reducing)
    ending = Parts(buffers=size * whole + _copied(sizes, layout))
    return max(passing, ending, key=_total)


def _reduces(step: Timeline, layout: Layout) -> np.ndarray:
    """Where a gradient is finished after which a bucket may be full."""
    finished = np.diff(step.gradients, prepend=0) > 0
    return finished & (step.gradients >= layout.weight_bytes * layout.bucket)


def _at_peak(active: np.ndarray, gradients: np.ndarray, buffers: np.ndarray) -> Parts:
    """The parts at the operation at which they are most together."""
    at = int((active + gradients + buffers).argmax())
    return Parts(
        gradients=int(gradients[at]), buffers=int(buffers[at]), activations=int(active[at])
    )


def _total(parts: Parts) -> int:
    return parts.total


def in_update(sizes: Sizes, layout: Layout, temporaries: int) -> int:
    """Bytes on the device beside `kept` when the update needs most.

    Args:
        temporaries: fp32 tensors that the optimizer makes for each tensor it updates: 1 where it
            works on lists of tensors, as torch's do on a GPU, else 2.
    """
    if layout.optimizer_on_host:
        return 0
    if layout.stage == 0:
        grown = 0 if layout.weight_bytes == _FP32 else _FP32 * sizes.trained
        whole = layout.weight_bytes * sizes.trained
        biggest = sizes.trained if temporaries == 1 else sizes.largest
        return whole + grown + temporaries * _FP32 * biggest
    groups = list(_group_shards(sizes, layout))
    held = _owned_gradients(sizes, layout) if layout.stage < 3 else 0
    copy = layout.gradient_bytes if layout.gradient_bytes < _FP32 else 0
    most = 0
    for index, elements in enumerate(groups):
        updated = min(elements, layout.sub_group) if layout.stage == 3 else elements
        # One tensor holds the gradients of all groups: it goes before the last one's update.
        beside = held if index + 1 < len(groups) else 0
        making = held + (copy + _FP32) * updated
        most = max(most, making, beside + _FP32 * (1 + temporaries) * updated)
    return most


def checkpoint_bytes(sizes: Sizes, layout: Layout, ema: bool) -> int:
    """Bytes of tensors in a tag, the files of all ranks together."""
    weights = layout.weight_bytes * sizes.parameters + _buffers(sizes, layout)
    states = (1 + sizes.moments) * _FP32 * sizes.trained
    if layout.stage == 0 and layout.weight_bytes == _FP32:
        states = sizes.moments * _FP32 * sizes.trained  # the weights are the masters
    if layout.stage == 3:
        weights = layout.weight_bytes * sum(sizes.frozen) + _buffers(sizes, layout)
        states = (1 + sizes.moments) * _FP32 * layout.ranks * shard(sizes, layout)
    average = _FP32 * sizes.trained + _ema_buffers(sizes) if ema else 0
    return int(weights + states + average)


def _all_parameters(sizes: Sizes) -> Iterable[int]:
    return (*(n for group in sizes.groups for n in group), *sizes.frozen)


def _elements_of_weights(sizes: Sizes, layout: Layout) -> int:
    """On the device between updates: padded at stages 1 and 2, a shard and small ones at 3."""
    if layout.stage == 0:
        return sizes.parameters
    if layout.stage < 3:
        return layout.ranks * shard(sizes, layout) + sum(sizes.frozen)
    shards = sum(math.ceil(n / layout.ranks) for n in _all_parameters(sizes))
    whole = sum(n for n in _all_parameters(sizes) if n <= layout.persistence)
    return whole + (0 if layout.parameters_on_host else shards)


def _group_shards(sizes: Sizes, layout: Layout) -> Iterable[int]:
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
    in_place = layout.stage == 0 and layout.weight_bytes == _FP32
    return 0 if in_place else _FP32 * shard(sizes, layout)


def _moments(sizes: Sizes, layout: Layout) -> int:
    return int(sizes.moments * _FP32 * shard(sizes, layout))


def _ema_shard(sizes: Sizes, layout: Layout) -> int:
    return _FP32 * shard(sizes, layout)


def _ema_buffers(sizes: Sizes) -> int:
    return _FP32 * sizes.float_buffers + sizes.other_buffers


def _buffers(sizes: Sizes, layout: Layout) -> int:
    """Of the module; the floating ones have the weights' dtype."""
    return layout.weight_bytes * sizes.float_buffers + sizes.other_buffers


def _buckets(layout: Layout) -> int:
    """The reduce buckets, of their full size. Under autocast one for each of two dtypes."""
    if layout.stage == 3:
        return layout.bucket * ((2 + _FP32) if layout.in_autocast else layout.weight_bytes)
    size = layout.gradient_bytes if layout.stage == 1 else layout.weight_bytes
    count = (2 if layout.overlap else 1) * (2 if layout.in_autocast else 1)
    return layout.bucket * size * count


def _copied(sizes: Sizes, layout: Layout) -> int:
    """The flat copy in which gradients are reduced; one that fits no bucket is there beside it."""
    if layout.stage == 0:
        return layout.weight_bytes * min(DEFAULT_BUCKET, sizes.trained)
    alone = sizes.largest if sizes.largest > layout.bucket else 0
    return layout.weight_bytes * (max(alone, min(layout.bucket, sizes.trained)) + alone)


def _owned_gradients(sizes: Sizes, layout: Layout) -> int:
    """What the rank with the most of them keeps of the gradients at stages 1 and 2, on the device.

    Gradients in the weights' dtype are kept whole where the rank owns any part of a parameter.
    """
    if layout.optimizer_on_host:
        return 0
    if layout.gradient_bytes != layout.weight_bytes:
        return layout.gradient_bytes * shard(sizes, layout)
    touched = np.zeros(layout.ranks, dtype=np.int64)
    for group, owned in zip(sizes.groups, _group_shards(sizes, layout), strict=True):
        ends = np.cumsum(group)
        first = np.arange(layout.ranks) * owned
        begin = np.searchsorted(ends, first, side='right')  # parameter at the partition's begin
        last = np.minimum(first + owned, ends[-1])
        end = np.searchsorted(ends, last, side='left')  # and that at its end
        starts = np.concatenate(([0], ends))
        inside = first < ends[-1]
        touched += np.where(inside, ends[np.minimum(end, len(ends) - 1)] - starts[begin], 0)
    return layout.weight_bytes * int(touched.max())


def _locked(size: int, pinned: bool) -> int:
    """Bytes of host memory: torch rounds page-locked tensors up to a power of two."""
    return 1 << (size - 1).bit_length() if pinned and size else size
