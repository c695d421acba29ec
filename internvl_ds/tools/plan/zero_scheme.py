"""The ZeRO scheme of a resolved ds_config: where the states lie, and how many bytes each takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.ds.auto_values import default_at, reduce_bucket_of

_BYTES = {'fp32': 4, 'float32': 4, 'fp16': 2, 'float16': 2, 'half': 2, 'bf16': 2, 'bfloat16': 2}


@dataclass(frozen=True)
class ZeroScheme:
    """The placement of weights, gradients and optimizer state by DeepSpeed."""

    stage: int  # of ZeRO, 0 to 3
    ranks: int  # among which the states are divided
    precision: str  # one of the constants of `ds_config`
    micro_batch: int  # images, on each rank
    accumulation: int  # micro-batches of an update
    optimizer_on_host: bool  # masters and moments are offloaded
    parameters_on_host: bool  # the weights' shards are, at stage 3
    optimizer_pinned: bool  # into page-locked host memory
    parameters_pinned: bool  # likewise
    bucket: int  # elements of a reduce bucket
    overlap: bool  # reduction beside the backward pass, with a second bucket at stages 1 and 2
    gradient_bytes: int  # of an element of the accumulated gradients
    reuse_distance: int  # elements; stage 3 keeps a weight whole that is used again within
    prefetch: int  # elements that stage 3 gathers ahead
    persistence: int  # elements below which a parameter is whole on every rank at stage 3
    sub_group: int  # elements that stage 3 updates at a time
    # whether the device is a GPU: torch's optimizers then work on lists of tensors, and page-locked
    # memory is rounded up
    on_gpu: bool

    @property
    def weight_bytes(self) -> int:
        """Bytes of an element of the weights that the module computes with."""
        return 2 if self.precision in (ds.BF16, ds.FP16) else 4

    @property
    def in_autocast(self) -> bool:
        """Whether torch autocast chooses the dtype of each operation."""
        return self.precision in (ds.AUTOCAST_BF16, ds.AUTOCAST_FP16)


def scheme_of(
    resolved: Mapping[str, Any], ranks: int, trained: int, on_gpu: bool = True
) -> ZeroScheme:
    """Reads a resolved ds_config, for so many ranks and trained elements."""
    zero = resolved.get('zero_optimization', {})
    stage, precision = int(zero.get('stage', 0)), ds.precision_of(resolved)
    optimizer, optimizer_pinned = _offload(zero, 'offload_optimizer')
    parameters, parameters_pinned = _offload(zero, 'offload_param')
    overlap = zero.get('overlap_comm')
    low = 2 if precision in (ds.BF16, ds.FP16) else 4
    dtype = resolved.get('data_types', {}).get('grad_accum_dtype')
    live = _stage_3_setting(zero, 'max_live_parameters')
    return ZeroScheme(
        stage=stage,
        ranks=ranks,
        precision=precision,
        micro_batch=int(resolved['train_micro_batch_size_per_gpu']),
        accumulation=int(resolved['gradient_accumulation_steps']),
        optimizer_on_host=optimizer and stage > 0,
        parameters_on_host=parameters and stage == 3,
        optimizer_pinned=optimizer_pinned,
        parameters_pinned=parameters_pinned,
        bucket=bucket_elements(resolved, trained),
        overlap=stage == 3 if overlap is None else bool(overlap),
        gradient_bytes=_BYTES.get(str(dtype), low),
        reuse_distance=_stage_3_setting(zero, 'max_reuse_distance'),
        prefetch=min(live, _stage_3_setting(zero, 'prefetch_bucket_size')),
        persistence=_stage_3_setting(zero, 'param_persistence_threshold'),
        sub_group=int(zero.get('sub_group_size', default_at('/zero_optimization/sub_group_size'))),
        on_gpu=on_gpu,
    )


def bucket_elements(resolved: Mapping[str, Any], trained: int) -> int:
    """Elements of the reduce bucket that DeepSpeed makes, whatever the model's size; 0 at stage 0.

    Where the ds_config leaves it open it is what `initialize` fills in.
    """
    zero = resolved.get('zero_optimization', {})
    if not zero.get('stage', 0):
        return 0
    size = zero.get('reduce_bucket_size', 'auto')
    return reduce_bucket_of(trained) if size == 'auto' else int(size)


def _stage_3_setting(zero: Mapping[str, Any], key: str) -> int:
    """A setting of stage 3, by either of the two names that DeepSpeed takes, or its default."""
    default = default_at(f'/zero_optimization/stage3_{key}')
    return int(zero.get(f'stage3_{key}', zero.get(key, default)))


def _offload(zero: Mapping[str, Any], key: str) -> tuple[bool, bool]:
    """Whether something is offloaded, and into page-locked memory."""
    section = zero.get(key) or {}
    on = section.get('device', 'none') not in (None, 'none')
    return on, on and bool(section.get('pin_memory', False))
