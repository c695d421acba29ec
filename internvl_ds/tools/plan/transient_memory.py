"""The memory that is allocated and freed within an update: its maximum. Pure."""

from __future__ import annotations

import numpy as np

from internvl_ds.config.ds.auto_values import reduce_bucket_of
from internvl_ds.tools.plan.activations import Timeline
from internvl_ds.tools.plan.sizes import Sizes
from internvl_ds.tools.plan.static_memory import (
    FP32_BYTES,
    Parts,
    all_parameters,
    bucket_bytes,
    group_shards,
    shard,
)
from internvl_ds.tools.plan.zero_scheme import ZeroScheme

_FP64_BYTES = 8


def in_backward(sizes: Sizes, scheme: ZeroScheme, step: Timeline) -> Parts:
    """The bytes on the device beside `static_parts` when forward and backward need most.

    The step is of the scheme's micro-batch, with whole gradients in the weights' dtype.
    """
    if scheme.stage == 3:
        return _in_backward_of_shards(sizes, scheme, step)
    size, active = scheme.weight_bytes, step.activations
    # Stage 1 keeps whole gradients in the dtype in which they accumulate.
    of_each = scheme.gradient_bytes if scheme.stage == 1 else size
    growth, total = step.gradients * (of_each / size), of_each * sizes.trained
    buckets = bucket_bytes(scheme) if scheme.stage else 0
    copies, shard_bytes = _copy_bytes(sizes, scheme), _owned_gradients(sizes, scheme)
    if scheme.stage == 2 and scheme.optimizer_on_host:
        copies += _FP64_BYTES * sizes.largest  # in which the norm of each gradient is taken
    reducing = np.zeros_like(active)  # the copy of a bucket, while it is reduced
    if scheme.stage < 2 and scheme.accumulation > 1:
        gradients = np.full_like(growth, total)
    elif scheme.stage == 0 or (scheme.stage == 1 and not scheme.overlap):
        gradients = growth
    else:
        # All memory for a rank's gradients is allocated when the first bucket is reduced.
        earlier = shard_bytes if scheme.accumulation > 1 else 0
        gradients = np.where(growth >= of_each * scheme.bucket, shard_bytes, 0) + earlier
        reducing = np.where(_reduces(step, scheme), copies, 0)
    passing = _at_peak(active, gradients, buckets + reducing)
    # After the backward pass the rest is reduced, from the buckets that hold a part of it.
    rest = float(total) if scheme.stage == 0 else gradients[-1]
    if scheme.stage == 1 and gradients[-1] > shard_bytes:
        rest = total - of_each * min(scheme.bucket, sizes.trained) + shard_bytes
    elif scheme.stage and not reducing.any():
        rest += shard_bytes
    return max(passing, Parts(gradients=int(rest), buffers=buckets + copies), key=_total)


def _in_backward_of_shards(sizes: Sizes, scheme: ZeroScheme, step: Timeline) -> Parts:
    """Stage 3: weights are gathered before they are used, and some stay until they are again."""
    scattered = [n for n in all_parameters(sizes) if n > scheme.persistence]
    elements, size = sum(scattered), scheme.weight_bytes
    ahead = min(elements, scheme.prefetch + sizes.largest_module)
    # Between forward and backward those are whole whose two uses lie within the distance.
    whole = min(elements, scheme.reuse_distance // 2 + ahead)
    # What is gathered at a time is there twice, until the last of it is used: once as it was
    # sent, under autocast in half precision.
    sent_size = 2 if scheme.in_autocast else size
    weights = np.full_like(step.activations, size * whole)
    weights[: step.forward] += sent_size * ahead
    weights[step.forward :] += sent_size * min(ahead, elements - whole)
    reducing = np.where(_reduces(step, scheme), _copy_bytes(sizes, scheme), 0)
    passing = _at_peak(step.activations, np.zeros_like(weights), weights + reducing)
    ending = Parts(buffers=size * whole + _copy_bytes(sizes, scheme))
    return max(passing, ending, key=_total)


def _reduces(step: Timeline, scheme: ZeroScheme) -> np.ndarray:
    """The operations that complete a gradient with which a bucket may be full."""
    ends = np.diff(step.gradients, prepend=0) > 0
    return ends & (step.gradients >= scheme.weight_bytes * scheme.bucket)


def in_update(sizes: Sizes, scheme: ZeroScheme) -> int:
    """Bytes on the device beside `static_parts` when the optimizer's update needs most."""
    if scheme.optimizer_on_host:
        return 0
    temporaries = 1 if scheme.on_gpu else 2
    if scheme.stage == 0:
        grown = 0 if scheme.weight_bytes == FP32_BYTES else FP32_BYTES * sizes.trained
        whole = scheme.weight_bytes * sizes.trained
        at_once = sizes.trained if scheme.on_gpu else sizes.largest
        return whole + grown + temporaries * FP32_BYTES * at_once
    groups = list(group_shards(sizes, scheme))
    gradients = _owned_gradients(sizes, scheme) if scheme.stage < 3 else 0
    copy = scheme.gradient_bytes if scheme.gradient_bytes < FP32_BYTES else 0
    most = 0
    for index, elements in enumerate(groups):
        at_once = min(elements, scheme.sub_group) if scheme.stage == 3 else elements
        # One tensor holds the gradients of all groups: it goes before the last one's update.
        beside = gradients if index + 1 < len(groups) else 0
        making = gradients + (copy + FP32_BYTES) * at_once
        most = max(most, making, beside + FP32_BYTES * (1 + temporaries) * at_once)
    return most


def in_update_on_host(sizes: Sizes, scheme: ZeroScheme) -> int:
    """Bytes in the host's memory beside `static_host_parts` while the optimizer runs there."""
    if not scheme.optimizer_on_host:
        return 0
    most = max(group_shards(sizes, scheme))
    if scheme.stage == 3:
        most = min(most, scheme.sub_group)
    return 2 * FP32_BYTES * most


def _owned_gradients(sizes: Sizes, scheme: ZeroScheme) -> int:
    """Bytes of gradients at stages 1 and 2 on the device, of the rank that keeps most.

    Gradients in the weights' dtype are kept whole where the rank owns any part of a parameter.
    """
    if scheme.optimizer_on_host:
        return 0
    if scheme.gradient_bytes != scheme.weight_bytes:
        return scheme.gradient_bytes * shard(sizes, scheme)
    whole = np.zeros(scheme.ranks, dtype=np.int64)
    for group, size in zip(sizes.groups, group_shards(sizes, scheme), strict=True):
        ends = np.cumsum(group)
        first = np.arange(scheme.ranks) * size
        begin = np.searchsorted(ends, first, side='right')  # parameter at the partition's begin
        last = np.minimum(first + size, ends[-1])
        end = np.searchsorted(ends, last, side='left')  # and that at its end
        starts = np.concatenate(([0], ends))
        inside = first < ends[-1]
        whole += np.where(inside, ends[np.minimum(end, len(ends) - 1)] - starts[begin], 0)
    return scheme.weight_bytes * int(np.max(whole))


def _copy_bytes(sizes: Sizes, scheme: ZeroScheme) -> int:
    """Bytes of the flat copy in which gradients are reduced; an oversized one lies beside it."""
    if scheme.stage == 0:
        return scheme.weight_bytes * reduce_bucket_of(sizes.trained)
    alone = sizes.largest if sizes.largest > scheme.bucket else 0
    return scheme.weight_bytes * (max(alone, min(scheme.bucket, sizes.trained)) + alone)


def _at_peak(active: np.ndarray, gradients: np.ndarray, buffers: np.ndarray) -> Parts:
    """The parts at the operation with the largest sum."""
    at = int((active + gradients + buffers).argmax())
    return Parts(
        gradients=int(gradients[at]), buffers=int(buffers[at]), activations=int(active[at])
    )


def _total(parts: Parts) -> int:
    return parts.total
