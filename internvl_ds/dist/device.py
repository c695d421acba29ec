"""The device of this rank, among those that it sees."""

from __future__ import annotations

import logging
import os

import torch
from deepspeed.accelerator import get_accelerator

from internvl_ds.errors import ConfigError

_log = logging.getLogger(__name__)

# torch reads these at its first allocation; the second since 2.9.
_ALLOCATOR = ('PYTORCH_CUDA_ALLOC_CONF', 'PYTORCH_ALLOC_CONF')
# Without the first, what micro-batches of other sizes leave behind cannot be used as a whole. With
# the second, page-locked host memory (the copies of background saves) of this size and more is not
# rounded up to powers of two. torch before 2.14 may not know the key, or give too small blocks.
_SETTINGS = 'expandable_segments:True'
_EXACT_FROM: int | None = None  # bytes
if tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 14):
    _SETTINGS += ',pinned_max_round_threshold_mb:128'
    _EXACT_FROM = 128 << 20


def take_device(local_rank: int) -> int:
    """Makes this rank's device the current one, before anything allocates on another.

    CUDA's memory is then taken in segments that grow, and large page-locked memory in its exact
    size, unless the environment says something of the allocator.

    Args:
        local_rank: this rank's number on its host.

    Returns:
        The device's index: the local rank, or 0 where a single device is visible, as under ``srun
        --gpus-per-task=1`` or a wrapper that sets CUDA_VISIBLE_DEVICES. On CPUs the local rank.

    Raises:
        ConfigError: when there are fewer devices than ranks on this host.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == 'cpu':
        return local_rank
    count = accelerator.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        visible = os.environ.get('CUDA_VISIBLE_DEVICES')
        shown = '' if visible is None else f' (CUDA_VISIBLE_DEVICES={visible})'
        raise ConfigError(
            f'local rank {local_rank} has no device: this host shows {count}{shown}. Start as many '
            'ranks on a host as it has devices, or show each rank its own'
        )
    if accelerator.device_name() == 'cuda' and not any(map(os.environ.get, _ALLOCATOR)):
        os.environ[_ALLOCATOR[0]] = _SETTINGS
        _log.debug('%s=%s: set, to waste less memory', _ALLOCATOR[0], _SETTINGS)
    accelerator.set_device(index)
    return index


def locked_bytes(size: int) -> int:
    """Bytes that torch takes for a page-locked tensor of so many, as `take_device` sets it."""
    if not size or (_EXACT_FROM is not None and size > _EXACT_FROM):
        return size
    return 1 << (size - 1).bit_length()


def emulates_bf16(device: str) -> bool:
    """Whether the current device computes bfloat16 in float32, as NVIDIA's before Ampere do.

    Args:
        device: the accelerator's name, such as 'cuda'.
    """
    if device != 'cuda' or torch.version.hip or not torch.cuda.is_available():
        return False
    return not torch.cuda.is_bf16_supported(including_emulation=False)


def slow_bf16(precision: str, device: str) -> str:
    """What to tell of a run in bfloat16 on a device that emulates it; '' where it does not.

    Args:
        precision: one of the constants of `ds_config`.
        device: as for `emulates_bf16`.
    """
    if 'bf' not in precision or not emulates_bf16(device):
        return ''
    return (
        f'this GPU has no bfloat16: {precision} is computed in float32 and rounded, many times '
        'slower. Set AMP_TYPE float16'
    )
