"""The device of this rank, among those that it sees."""

from __future__ import annotations

import os

import torch
from deepspeed.accelerator import get_accelerator

from internvl_ds.errors import ConfigError


def take_device(local_rank: int) -> int:
    """Makes this rank's device the current one, before anything allocates on another.

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
    accelerator.set_device(index)
    return index


def emulates_bf16(device: str) -> bool:
    """Whether the current device computes bfloat16 in float32, as NVIDIA's before Ampere do.

    Args:
        device: the accelerator's name, such as 'cuda'.
    """
    if device != 'cuda' or torch.version.hip or not torch.cuda.is_available():
        return False
    return not torch.cuda.is_bf16_supported(including_emulation=False)
