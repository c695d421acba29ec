"""Whether an optimizer may be given pieces of tensors, as ZeRO stages 1 to 3 do. Found by trial."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from internvl_ds.engine.optimizer_trial import copy_of
from internvl_ds.errors import ConfigError

_UPDATES = 3

# Sides from which every known optimizer factors its state; matrices, because Muon takes nothing
# else. In float64 the sums of both forms agree far better than LARS's small steps differ.
_SHAPES = ((128, 130), (130, 160))


def require_own_adagrad(optimizer: torch.optim.Optimizer) -> None:
    """Raises ConfigError for torch's Adagrad, which DeepSpeed replaces at ZeRO stages 1 to 3."""
    if isinstance(optimizer, torch.optim.Adagrad):
        raise ConfigError(
            'Adagrad at ZeRO stages 1 to 3: DeepSpeed makes another one of its defaults in its '
            'place, which no parameter group and no lr schedule reaches: use stage 0, or AdamW'
        )


def require_elementwise(optimizer: Any, device: torch.device) -> None:
    """Refuses, for ZeRO stages 1 to 3, an optimizer that needs its tensors whole.

    There it gets flat pieces in which many tensors lie, or parts of them: LAMB's and LARS's norms,
    Adafactor's rows and columns would be others, and training would go on with wrong numbers.

    Args:
        optimizer: the client's, or the one that the ds_config names; it stays as it is.
        device: where it is tried.

    Raises ConfigError, which names its class.
    """
    if type(optimizer).__module__.startswith('deepspeed.'):
        return
    for group in optimizer.param_groups:
        if not _is_elementwise(optimizer, group, device):
            raise ConfigError(
                f'{type(optimizer).__name__} at ZeRO stages 1 to 3: its update of an element '
                'depends on the tensor that it is in, and ZeRO gives it flat pieces of many: use '
                'stage 0, or an optimizer such as AdamW, SGD or Lion'
            )


def _is_elementwise(
    optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], device: torch.device
) -> bool:
    """Whether whole tensors and one flat tensor of them come out alike; True if not known."""
    devices = [] if device.type == 'cpu' else [device]
    whole = _weights_and_gradients(device)
    flat = [[torch.cat([tensor.flatten() for tensor in tensors])] for tensors in whole]
    with (
        torch.random.fork_rng(devices, device_type=device.type if devices else 'cuda'),
        torch.compiler.set_stance('force_eager'),
    ):
        try:
            of_whole = _weights_after(optimizer, settings, *whole)
        except Exception:  # it needs a closure, or more than its class says
            return True
        try:
            of_flat = _weights_after(optimizer, settings, *flat)
        except Exception:  # Muon takes matrices only
            return False
    distance = (of_whole - flat[0][0]).abs().max()
    return bool((of_whole - of_flat).abs().max() <= 1e-6 * distance)


def _weights_and_gradients(device: torch.device) -> list[list[torch.Tensor]]:
    """Gradients at right angles to the weights, where AdamP and SGDP do more than Adam and SGD."""
    weights, gradients = [], []
    for size, shape in enumerate(_SHAPES, 1):
        count = torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64, device=device)
        weight = size * count.sin()
        gradient = weight.clone()
        gradient[0::2], gradient[1::2] = weight[1::2], -weight[0::2]
        weights.append(weight.reshape(shape))
        gradients.append(gradient.reshape(shape) / 10**size)
    return [weights, gradients]


def _weights_after(
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The weights, flat, after some updates of a copy of the optimizer."""
    copies = [nn.Parameter(weight.clone()) for weight in weights]
    memo: dict[int, Any] = {id(p): copies[0] for g in optimizer.param_groups for p in g['params']}
    group = copy.deepcopy({k: v for k, v in settings.items() if k != 'params'}, memo)
    # A warm-up begins with 0, with which nothing moves.
    group['lr'] = torch.full_like(group['lr'], 0.01) if torch.is_tensor(group['lr']) else 0.01
    trial = copy_of(optimizer, [{**group, 'params': copies}], memo)
    for update in range(_UPDATES):
        for parameter, gradient in zip(copies, gradients, strict=True):
            parameter.grad = gradient * (1 + update)
        type(optimizer).step(trial)
    return torch.cat([parameter.detach().flatten() for parameter in copies])
