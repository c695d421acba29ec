"""Parameters that ZeRO-3 or zero.Init has partitioned: one slice on each rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import (
    Init,
    ZeroParamStatus,
    restore_init_context,
    shutdown_init_context,
)
from packaging.version import Version

from internvl_ds.zero.lazy_tensor import Flat


def is_sharded(tensor: Any) -> bool:
    """Whether ZeRO-3 or zero.Init has cut a parameter into one slice for each rank."""
    return hasattr(tensor, 'ds_id')


def is_partitioned(parameter: Any) -> bool:
    """Whether a ZeRO optimizer keeps the parameter's gradient in parts (stages 1 to 3)."""
    return hasattr(parameter, '_hp_mapping') or is_sharded(parameter)


def whole_shape(tensor: Any) -> torch.Size:
    """The shape that the model declared, of a tensor that may be partitioned."""
    return torch.Size(getattr(tensor, 'ds_shape', tensor.shape))


def whole_numel(tensor: Any) -> int:
    """The elements that the model declared, of a tensor that may be partitioned."""
    return getattr(tensor, 'ds_numel', tensor.numel())


def local_values(tensor: Any) -> torch.Tensor:
    """The values on this rank: a slice, or the whole of an unpartitioned tensor."""
    return getattr(tensor, 'ds_tensor', tensor)


def unwritable(parameter: Any) -> str:
    """Why writing a sharded parameter's slice does not set its values; '' if it does."""
    if not is_sharded(parameter):
        return ''
    if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
        return 'is gathered at the moment; call it outside of GatheredParameters'
    second = getattr(parameter, 'ds_secondary_tensor', None)
    if second is not None or not parameter.ds_tensor.numel():
        return (
            'is kept in a second partition (zero_hpz_partition_size), which is not '
            'supported; build the model without'
        )
    return ''


@contextmanager
def outside_zero_init() -> Iterator[None]:
    """Suspends zero.Init's patches of torch for the block, if one is entered.

    It gives every new tensor the engine's dtype and device: what is read from a file would be cut
    up by it into numbers of another size.
    """
    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


def shard_alike(source: Any, tensor: torch.Tensor) -> None:
    """Partitions a whole tensor in place, as another parameter is."""
    source.convert_to_zero_parameters([tensor])


def own_slice(parameter: Any) -> tuple[int, int]:
    """The elements of a sharded parameter that this rank keeps."""
    length, whole = parameter.ds_tensor.ds_numel, parameter.ds_numel
    start = torch.distributed.get_rank(group=parameter.ds_process_group) * length
    return min(start, whole), min(start + length, whole)


def copy_slice(parameter: Any, whole: Flat) -> None:
    """Copies this rank's elements of a whole tensor into its slice of the parameter."""
    start, stop = own_slice(parameter)
    whole.copy_to(parameter.ds_tensor.data[: stop - start], start)


# Before 0.19 DeepSpeed waits for the last of several gathers only. gloo does them in any order, so
# that some parameters would hold what was in memory.
if Version(deepspeed.__version__) < Version('0.19.8') and get_accelerator().device_name() == 'cpu':
    _gather_all = Init._allgather_params_coalesced

    def _gather_one_by_one(init: Any, parameters: list[Any], *args: Any, **kwargs: Any) -> None:
        for parameter in parameters:
            _gather_all(init, [parameter], *args, **kwargs)

    Init._allgather_params_coalesced = _gather_one_by_one
