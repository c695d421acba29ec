"""The norm of gradients that ZeRO partitions, and the parameters with non-finite gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.dist.rendezvous import world_size
from internvl_ds.engine.registry import wrapper_of, wrapper_of_parameter
from internvl_ds.errors import EngineNotFound, InternvlDsError
from internvl_ds.zero.parameters import is_partitioned


def get_grad_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor], norm_type: float = 2
) -> torch.Tensor:
    """The norm of all the parameters' gradients, taken as one vector.

    For parameters of a ZeRO engine (stages 1-3), where ``p.grad`` is None, each rank takes the part
    of the gradients that it owns, and one small all-gather adds them up. Collective: every rank
    calls it, between the backward of a boundary and the step, with the same parameters. Those that
    the engine does not train, because they were unfrozen after it was made, do not count. An
    engine's loss scale is divided out.

    Args:
        parameters: one tensor or several.
        norm_type: any p > 0, or inf.

    Returns:
        0-dim float32 tensor on the parameters' device; 0 for plain parameters of which none has a
        gradient.

    Raises:
        InternvlDsError: on all ranks, for parameters of a ZeRO engine whose gradients are not
            there, as after a step: 0 would be no answer. Also for a norm_type that is none.
        EngineNotFound: for parameters that a ZeRO engine partitions that is not registered.
    """
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    norm_type = float(norm_type)
    if not norm_type > 0:
        raise InternvlDsError(f'get_grad_norm: norm_type is {norm_type}; any p > 0, or inf')
    if not parameters:
        return torch.zeros(())
    device = parameters[0].device
    partitioned = [p for p in parameters if p.requires_grad and is_partitioned(p)]
    whole = [p for p in parameters if not is_partitioned(p) and not _is_left_alone(p)]
    grads = [p.grad for p in whole if p.grad is not None]
    norm = _norm_of(grads, norm_type, device) / _scale_of(whole)
    if not partitioned:
        return norm
    wrapper = wrapper_of_parameter(partitioned[0])
    if wrapper is None:
        raise EngineNotFound(
            'get_grad_norm: these parameters are of a ZeRO engine that is not known; call '
            'internvl_ds.register(engine)'
        )
    parts = wrapper.owned_gradients()
    fragments = [] if parts is None else [parts[p] for p in partitioned if p in parts]
    norm_here = _norm_of(fragments, norm_type, device) / _scale_of(partitioned)
    # All ranks enter this, whether their gradients are there or not, and all learn the same.
    report = torch.stack([norm_here, torch.tensor(float(parts is not None), device=device)])
    reports = report.new_empty(world_size() * 2)
    dist.all_gather_into_tensor(reports, report)
    norms, flags = reports.view(-1, 2).unbind(1)
    if not bool(flags.all()):
        raise InternvlDsError(
            'get_grad_norm: no gradients are there. Under ZeRO they exist between backward and '
            'step only; NativeScalerWithGradNormCount returns the norm of each step.'
        )
    return torch.linalg.vector_norm(torch.cat([norms, norm.view(1)]), norm_type)


def non_finite_flags(engine: DeepSpeedEngine) -> torch.Tensor:
    """Whether this rank sees a non-finite gradient, for each trained parameter of the module.

    Returns:
        1-dim float32 tensor of zeros and ones on the engine's device, not read on the host.
    """
    parts, zero = wrapper_of(engine).owned_gradients() or {}, torch.zeros((), device=engine.device)
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    bad = {p: (~torch.isfinite(part).all()).to(zero) for p, part in parts.items()}
    return torch.stack([bad.get(p, zero) for p in trained])


def _is_left_alone(parameter: torch.Tensor) -> bool:
    """Whether a ZeRO engine has the parameter but does not train it, as it was unfrozen later.

    Its gradient is each rank's own, and every backward adds to it.
    """
    wrapper = wrapper_of_parameter(parameter) if parameter.grad is not None else None
    return wrapper is not None and wrapper.partitioned


def _scale_of(parameters: list[torch.Tensor]) -> float:
    """The loss scale that the gradients of an engine's parameters carry; 1.0 for plain ones."""
    wrapper = wrapper_of_parameter(parameters[0]) if parameters else None
    return 1.0 if wrapper is None or wrapper.scale is None else wrapper.scale.scale


def _norm_of(tensors: list[torch.Tensor], norm_type: float, device: Any) -> torch.Tensor:
    norms = [torch.linalg.vector_norm(t.detach().float(), norm_type) for t in tensors if t.numel()]
    norms = [norm.to(device) for norm in norms]
    if not norms:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)
