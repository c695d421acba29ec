"""TRAIN.COMPILE: compiles an engine's module with torch.compile."""

from __future__ import annotations

import logging
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from yacs.config import CfgNode

from internvl_ds.config.tree import checkpoint_option, get_option
from internvl_ds.dist.rendezvous import exchange
from internvl_ds.errors import ConfigError, few

KEY = 'TRAIN.COMPILE'

_log = logging.getLogger(__name__)


def compile_module(engine: DeepSpeedEngine, config: CfgNode) -> None:
    """Compiles an engine's module at its first forward passes, if TRAIN.COMPILE is set.

    The module stays the same object: its parameters keep their names, and checkpoints do not
    tell whether it was compiled. Random numbers (dropout, drop path) are those of the module that
    is not compiled. Collective: every rank calls it.

    Args:
        engine: with all of its hooks, and without a forward pass yet.
        config: TRAIN.COMPILE, and CHECKPOINT.IO_TIMEOUT as the limit of a trial, are read.

    Raises:
        ConfigError: on all ranks, where a rank cannot compile with that backend.
    """
    backend = get_option(config, KEY, '')
    if not backend:
        return
    device = get_accelerator().current_device_name()
    limit = checkpoint_option(config, 'IO_TIMEOUT')
    faults = exchange('compile', _fault_of(backend, device), limit)
    bad = [rank for rank, fault in enumerate(faults) if fault]
    if bad:
        raise ConfigError(
            f'{KEY} {backend!r}: torch.compile does not work on rank {few(bad)} '
            f"({faults[bad[0]]}); mend that (internvl-ds doctor names compilers), or set it to ''"
        )
    engine.compile(backend=backend, compile_kwargs=_options(backend))
    _log.info('torch.compile (%s): the first updates take longer, while it compiles', backend)


def _options(backend: str) -> dict[str, Any]:
    # Else dropout draws other numbers than without compiling, and the loss cannot be compared.
    return {'options': {'fallback_random': True}} if backend == 'inductor' else {}


def _fault_of(backend: str, device: str) -> str:
    """Why a small function with a gradient cannot be compiled; '' where it can."""
    x = torch.linspace(0.5, 1.5, 64, device=device, requires_grad=True)

    def small(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x).sum()

    try:
        compiled = torch.compile(small, backend=backend, **_options(backend))
        (grad,) = torch.autograd.grad(compiled(x), x)
    except Exception as error:  # of the compiler, in many kinds
        return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
    (right,) = torch.autograd.grad(small(x), x)
    return '' if torch.allclose(grad, right) else 'the gradient of a small function is wrong'
