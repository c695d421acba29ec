"""The loss-scaler bridge: GradScaler's calling convention over engine.backward and engine.step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.comm import world_size
from internvl_ds.engine import engine_of, step_scheduler
from internvl_ds.errors import ConfigError, InternvlDsError


class NativeScalerWithGradNormCount:
    """Backward, and on a boundary: clip, step, and report the gradient norm.

    Every rank must make every call. The caller divides the loss by the accumulation steps and
    marks the boundary with ``update_grad``; the engine neither divides again nor counts otherwise.

    Attributes:
        step_was_skipped: whether the last boundary's update was skipped for a non-finite gradient.
    """

    state_dict_key = 'amp_scaler'

    def __init__(self) -> None:
        self.step_was_skipped = False
        self._engine: weakref.ref[DeepSpeedEngine] | None = None

    def __call__(
        self,
        loss: torch.Tensor,
        optimizer: Any,
        clip_grad: float | None = None,
        parameters: Iterable[torch.Tensor] | None = None,
        create_graph: bool = False,
        update_grad: bool = True,
    ) -> torch.Tensor | None:
        """Runs one micro-batch's backward, and the update when it is a boundary.

        Args:
            loss: 0-dim, this rank's mean loss divided by the accumulation steps.
            optimizer: what `initialize` returned, the client's own optimizer, or the engine.
            clip_grad: largest global L2 norm, for this update; None or 0 clips nothing, whatever
                the ds_config's gradient_clipping is.
            parameters: accepted for the original's calls; the engine knows its parameters.
            create_graph: not supported over an engine.
            update_grad: whether this micro-batch completes an update.

        Returns:
            On a boundary the L2 norm over all ranks and shards of the gradients that the update
            saw before clipping: 0-dim, float32, on the engine's device; not finite when the
            update was skipped. None otherwise.

        Raises:
            EngineNotFound: when ``optimizer`` belongs to no known engine.
            ConfigError: for ``create_graph=True``.
        """
        engine = engine_of(optimizer)
        self._engine = weakref.ref(engine)
        if create_graph:
            raise ConfigError('create_graph=True: DeepSpeed engines keep no graph of the backward')
        engine.set_gradient_accumulation_boundary(update_grad)
        engine.backward(loss, scale_wrt_gas=False)
        if not update_grad:
            engine.step()  # counts the micro-batch; no update off a boundary
            return None
        norm = _step_and_norm(engine, float(clip_grad or 0.0))
        self.step_was_skipped = not engine.was_step_applied()
        if not self.step_was_skipped:
            step_scheduler(engine)
        return norm

    @property
    def loss_scale(self) -> float:
        """What the engine multiplies the loss by; 1.0 without a scale or before the first call."""
        engine = self._engine() if self._engine is not None else None
        scale = getattr(engine.optimizer, 'loss_scale', 1.0) if engine is not None else 1.0
        return float(scale)

    def state_dict(self) -> dict[str, float]:
        """``{'scale': the loss scale}``, as torch's GradScaler names it."""
        return {'scale': self.loss_scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accepts `state_dict`'s result or a GradScaler's; in fp32 and bf16 there is no scale to
        restore, and what the engine itself keeps comes with the engine's checkpoint.
        """
        if state_dict and 'scale' not in state_dict:
            raise InternvlDsError(
                f'not the state of a loss scaler: no scale among {sorted(state_dict)[:5]}'
            )


def get_grad_norm(
    parameters: torch.Tensor | Iterable[torch.Tensor], norm_type: float = 2
) -> torch.Tensor:
    """The norm of the gradients that the parameters have, taken together as one vector.

    For parameters of a ZeRO engine (stages 1-3), where ``p.grad`` is None, each rank takes the
    part of the gradients that it owns, and one small all-gather adds them up: every rank must then
    call it, between backward and step, with the same parameters.

    Args:
        parameters: one tensor or several.
        norm_type: any p > 0, or inf.

    Returns:
        0-dim float32 tensor; 0 for plain parameters of which none has a gradient.

    Raises:
        InternvlDsError: on all ranks, for parameters of a ZeRO engine whose gradients are not
            there, as after a step: 0 would be no answer.
    """
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    norm_type = float(norm_type)
    partitioned = [p for p in parameters if p.requires_grad and _is_partitioned(p)]
    whole = [p.grad for p in parameters if p.grad is not None and not _is_partitioned(p)]
    device = parameters[0].device if parameters else None
    norm = _norm_of(whole, norm_type, device)
    if not partitioned:
        return norm
    fragments = [_own_gradient(p) for p in partitioned]
    there = all(f is not None for f in fragments)
    own = _norm_of([f for f in fragments if f is not None], norm_type, device)
    # All ranks enter this, whether their gradients are there or not, and all learn the same.
    report = torch.stack([own, torch.tensor(float(there), device=device)])
    reports = report.new_empty(world_size() * 2)
    dist.all_gather_into_tensor(reports, report)
    norms, present = reports.view(-1, 2).unbind(1)
    if not bool(present.all()):
        raise InternvlDsError(
            'get_grad_norm: no gradients are there. Under ZeRO they exist between backward and '
            'step only; NativeScalerWithGradNormCount returns the norm of each step.'
        )
    return torch.linalg.vector_norm(torch.cat([norms, norm.view(1)]), norm_type)


def _is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether a ZeRO optimizer keeps the parameter's gradient in parts (stages 1-3)."""
    return hasattr(parameter, '_hp_mapping') or hasattr(parameter, 'ds_id')


def _own_gradient(parameter: Any) -> torch.Tensor | None:
    """This rank's part of a partitioned gradient, maybe empty; None where there is no gradient."""
    if hasattr(parameter, 'ds_id'):
        optimizer = parameter._z3_optimizer
        # The buffers keep an old gradient; these two say whether a backward came after the step.
        fresh = optimizer.micro_step_id > 0 or optimizer._epilogue_ran_this_backward
        return optimizer.get_local_fp32_grad_for_param(parameter) if fresh else None
    if parameter._hp_mapping is None:  # all of it is another rank's
        return parameter.new_empty(0)
    try:
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
    except ValueError:
        return None


def _norm_of(tensors: list[torch.Tensor], norm_type: float, device: Any) -> torch.Tensor:
    norms = [
        torch.linalg.vector_norm(t.detach().float(), norm_type).to(device)
        for t in tensors
        if t.numel()
    ]
    if not norms:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def _step_and_norm(engine: DeepSpeedEngine, clip_grad: float) -> torch.Tensor:
    optimizer = engine.optimizer
    if hasattr(optimizer, '_global_grad_norm'):
        # DeepSpeed's own wrappers clip by this attribute, and report the norm after the step.
        optimizer.clip_grad = clip_grad
        engine.step()
        norm = engine.get_global_grad_norm() if engine.was_step_applied() else math.inf
        return torch.as_tensor(norm, device=engine.device).to(torch.float32)
    return _step_client_optimizer(engine, clip_grad)


def _step_client_optimizer(engine: DeepSpeedEngine, clip_grad: float) -> torch.Tensor:
    """Stage 0 with the client's own optimizer: DeepSpeed reports no norm and applies nan there."""
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).to(torch.float32)
    finite = bool(torch.isfinite(norm))
    if not finite:
        engine.zero_grad()  # a torch optimizer passes over parameters without a gradient
    elif clip_grad > 0:
        params = [p for p in engine.module.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(params, clip_grad, norm)
    # The engine reads `overflow` where an optimizer has it, and then counts the step as skipped.
    engine.optimizer.overflow = not finite
    engine_clip, engine._config.gradient_clipping = engine._config.gradient_clipping, 0.0
    try:
        engine.step()
    finally:
        engine._config.gradient_clipping = engine_clip
    return norm
