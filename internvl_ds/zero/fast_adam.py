"""Chooses the AdamW of a run: DeepSpeed's for the host or for a GPU, or torch's."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder
from yacs.config import CfgNode

from internvl_ds.config.choices import require_one_of
from internvl_ds.config.tree import checkpoint_option, get_option, value_at
from internvl_ds.dist.rendezvous import exchange
from internvl_ds.errors import ConfigError, few

_log = logging.getLogger(__name__)

_KEY = 'TRAIN.OPTIMIZER.ADAM'
_CLASSES: dict[str, tuple[Any, Any]] = {
    'cpu': (DeepSpeedCPUAdam, CPUAdamBuilder),
    'fused': (FusedAdam, FusedAdamBuilder),
    'torch': (torch.optim.AdamW, None),
}


def may_be_cpu_adam(config: CfgNode) -> bool:
    """Whether `adam_class` makes the configured optimizer DeepSpeedCPUAdam with offload."""
    is_adamw = get_option(config, 'TRAIN.OPTIMIZER.NAME').lower() == 'adamw'
    return is_adamw and get_option(config, _KEY) in ('auto', 'cpu')


def adam_class(config: CfgNode, ds_config: Mapping[str, Any]) -> Callable[..., Any]:
    """The class that TRAIN.OPTIMIZER.ADAM means, compiled. Collective: every rank calls it.

    Args:
        config: TRAIN.OPTIMIZER.ADAM and CHECKPOINT.IO_TIMEOUT, a limit of the compiling, are read.
        ds_config: resolved.

    Raises:
        ConfigError: for one that does not go with the ds_config or the device, or that is forced
            and cannot be compiled.
    """
    if get_option(config, 'TRAIN.OPTIMIZER.NAME').lower() != 'adamw':
        return torch.optim.AdamW
    name, is_forced = chosen_adam(config, ds_config, get_accelerator().device_name())
    adam, builder = _CLASSES[name]
    if builder is None:
        return adam
    _log.info('%s: compiled now where it has not been, in about a minute', adam.__name__)
    limit = checkpoint_option(config, 'IO_TIMEOUT')
    faults = exchange('fast adam', _fault_of(builder, limit / 2), limit)
    bad = [rank for rank, fault in enumerate(faults) if fault]
    if not bad:
        return adam
    where = f'{adam.__name__} cannot be compiled on rank {few(bad)} ({faults[bad[0]]})'
    if is_forced:
        raise ConfigError(
            f'{where}, and {_KEY} {get_option(config, _KEY)!r} or /zero_force_ds_cpu_optimizer '
            "wants it: internvl-ds doctor says what is missing; or take torch's, "
            f"{_KEY} 'torch' with /zero_force_ds_cpu_optimizer false"
        )
    _log.warning("%s: torch's AdamW is used, which is slower", where)
    return torch.optim.AdamW


def chosen_adam(config: CfgNode, ds_config: Mapping[str, Any], device: str) -> tuple[str, bool]:
    """Returns 'torch', 'cpu' or 'fused', and whether no other may take its place. Pure.

    Raises:
        ConfigError: as `adam_class`.
    """
    asked = get_option(config, _KEY)
    zero = ds_config.get('zero_optimization', {})
    offloads = value_at(zero, 'offload_optimizer', 'device', default='none') != 'none'
    stage = zero.get('stage', 0)
    on_cpu = offloads or device == 'cpu'
    require_one_of(_KEY, asked, ('auto', *_CLASSES))
    if asked == 'auto':
        if offloads:
            return 'cpu', ds_config.get('zero_force_ds_cpu_optimizer', True) is True
        return ('fused' if stage and device != 'cpu' else 'torch'), False
    fault = ''
    if asked == 'cpu' and not on_cpu:
        fault = f'steps on the host, and the weights are on the {device} device'
    elif asked == 'fused' and offloads and device != 'cpu':
        fault = 'steps on the device, and the ds_config offloads the optimizer to the host'
    elif asked == 'fused' and not stage:
        # In 0.19.8 its step() adds to the `step` of a group's last tensor alone.
        fault = 'does not go with ZeRO stage 0: it counts updates for one tensor of a group alone'
    if fault:
        raise ConfigError(f"{_KEY} {asked!r}: {_CLASSES[asked][0].__name__} {fault}; use 'auto'")
    return asked, asked != 'torch'


def _fault_of(builder: Any, limit: float) -> str:
    """Compiles and loads an op of DeepSpeed's, within ``limit`` seconds; '' or why not.

    torch waits without end for the lock that a compilation leaves that was killed.
    """
    faults = [f'not done within {limit:g} s; where no compiler runs, remove its lock in '
              f'TORCH_EXTENSIONS_DIR, {builder.NAME}/lock']  # fmt: skip

    def load() -> None:
        try:
            builder().load()
        except Exception as error:
            faults[:] = [f'{type(error).__name__}: {" ".join(str(error).split())[:200]}']
        else:
            faults[:] = ['']

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(limit)
    return faults[0]
