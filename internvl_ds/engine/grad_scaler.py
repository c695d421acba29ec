"""The loss-scaler bridge: GradScaler's calling convention over engine.backward and engine.step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.dist.rendezvous import rank
from internvl_ds.engine.grad_norm import get_grad_norm, non_finite_flags
from internvl_ds.engine.overflow import OverflowWatch
from internvl_ds.engine.registry import (
    accumulation_of,
    engine_of,
    loss_scale_of,
    overflow_limit,
)
from internvl_ds.engine.scheduling import require_schedule_untouched, step_scheduler
from internvl_ds.errors import ConfigError
from internvl_ds.zero.gradients import begin_backward
from internvl_ds.zero.loss_scale import require_scaler_state
from internvl_ds.zero.loss_scale_sync import (
    push,
    scale_held,
    scale_loss,
    skipping_non_finite,
    steps_client_optimizer,
)
from internvl_ds.zero.master_weights import require_trained_unfrozen

__all__ = ['NativeScalerWithGradNormCount', 'get_grad_norm']


class NativeScalerWithGradNormCount:
    """Backward, and on a boundary: clip, step, and report the gradient norm.

    Every rank must make every call. The caller divides the loss by the accumulation steps and
    marks the boundary with ``update_grad``; the engine neither divides again nor counts otherwise.

    An update with a non-finite gradient on any rank is skipped on all, in every precision. With a
    loss scale (float16) the scale falls then, and grows again as torch's GradScaler would have it.

    Args:
        before_stop: keyword-only; called on all ranks before `GradientOverflow` stops the run, for
            instance to save: ``lambda: save_checkpoint(..., best='overflow')``, whose tag is
            neither ``latest`` nor counted.

    Attributes:
        before_stop: the argument.
        step_was_skipped: whether the last boundary's update was skipped for a non-finite gradient.
    """

    state_dict_key = 'amp_scaler'

    def __init__(self, *, before_stop: Callable[[], Any] | None = None) -> None:
        self.step_was_skipped = False
        self.before_stop = before_stop
        self._engine: weakref.ref[DeepSpeedEngine] | None = None
        self._loaded: Mapping[str, Any] = {}  # until the engine is known
        self._watch = OverflowWatch()

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
            update_grad: whether this micro-batch completes an update. An update is of the engine's
                gradient_accumulation_steps micro-batches; the last of an epoch may be of fewer.
                ``optimizer.zero_grad()`` drops those since the last update.

        Returns:
            On a boundary the L2 norm over all ranks and shards of the gradients that the update
            saw, unscaled and before clipping: 0-dim, float32, on the engine's device; not finite
            when the update was skipped. None otherwise.

        Raises:
            EngineNotFound: when ``optimizer`` belongs to no known engine.
            ConfigError: for ``create_graph=True``, for a parameter that was frozen since the engine
                was made to train it, on a boundary that does not agree with
                gradient_accumulation_steps, and where the script steps the lr_scheduler that was
                given to the engine; before anything is done.
            GradientOverflow: on all ranks, after a skipped update with the loss scale at its
                minimum, or the last of TRAIN.MAX_CONSECUTIVE_OVERFLOWS in a row.
        """
        engine = engine_of(optimizer)
        self._attach(engine)
        if create_graph:
            raise ConfigError(
                'create_graph=True: engine.backward of DeepSpeed keeps no graph of the backward, '
                'and the gradients that ZeRO and its all-reduce leave have none. A second-order '
                'optimizer needs plain PyTorch; take a first-order one here.'
            )
        require_trained_unfrozen(engine)
        require_schedule_untouched(engine)
        accumulation = accumulation_of(engine)
        if update_grad:
            accumulation.require_agreed(engine.gradient_accumulation_steps(), engine.global_steps)
        accumulation.add(loss)
        begin_backward(engine)
        engine.set_gradient_accumulation_boundary(update_grad)
        engine.backward(scale_loss(engine, loss), scale_wrt_gas=False)
        if not update_grad:
            engine.step()  # counts the micro-batch; no update off a boundary
            return None
        return self._update(engine, float(clip_grad or 0.0))

    @property
    def loss_scale(self) -> float:
        """What the losses are multiplied by; 1.0 without a scale, or before it is known."""
        engine = self._engine() if self._engine is not None else None
        scale = loss_scale_of(engine) if engine is not None else None
        return float(self._loaded.get('scale', 1.0)) if scale is None else scale.scale

    def state_dict(self) -> dict[str, Any]:
        """The state of torch's GradScaler (``scale``, ``_growth_tracker``, ...) with the hysteresis
        and the last update's micro-batches; ``scale`` is 1.0 without a loss scale.
        """
        engine = self._engine() if self._engine is not None else None
        if engine is None:
            return {'scale': 1.0, **self._loaded}
        scale = loss_scale_of(engine)
        state = {'scale': 1.0} if scale is None else scale.state_dict()
        return {**state, 'micro_batches': accumulation_of(engine).last_group}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Accepts `state_dict`'s result or a GradScaler's, at once or with the first call.

        In fp32 and bf16 there is no scale to restore, and a static one stays as configured.

        Raises:
            InternvlDsError: for what is neither.
        """
        require_scaler_state(state_dict)
        self._loaded = dict(state_dict)
        engine = self._engine() if self._engine is not None else None
        if engine is not None:
            self._restore(engine)

    def _attach(self, engine: DeepSpeedEngine) -> None:
        if self._engine is None or self._engine() is not engine:
            self._engine = weakref.ref(engine)
            self._restore(engine)

    def _restore(self, engine: DeepSpeedEngine) -> None:
        scale = loss_scale_of(engine)
        if scale is not None and self._loaded:
            scale.load_state_dict(self._loaded)
            push(engine, scale)
        if self._loaded:
            accumulation_of(engine).last_group = self._loaded.get('micro_batches')
        self._loaded = {}

    def _update(self, engine: DeepSpeedEngine, clip_grad: float) -> torch.Tensor:
        scale, limit = loss_scale_of(engine), overflow_limit(engine)
        factor = 1.0 if scale is None else scale.scale
        # Which parameters overflow is gone after the step, so it is looked at before.
        flags = self._flags(engine) if self._watch.would_stop(scale, limit) else None
        norm = _step_and_norm(engine, clip_grad, factor)
        self.step_was_skipped = not engine.was_step_applied()
        if scale is not None:
            scale.update(self.step_was_skipped)
            push(engine, scale)
        losses = accumulation_of(engine).finish(engine.gradient_accumulation_steps())
        self._watch.record(losses, norm, factor, self.step_was_skipped)
        if not self.step_was_skipped:
            step_scheduler(engine)
        elif flags is not None:
            self._stop(engine, flags)
        return norm

    def _flags(self, engine: DeepSpeedEngine) -> torch.Tensor:
        """Whether each parameter's gradient, and at last the loss, is not finite on this rank."""
        losses = accumulation_of(engine).losses
        loss = torch.stack([loss.float() for loss in losses]).sum()
        bad_loss = (~torch.isfinite(loss)).float().view(1)
        return torch.cat([non_finite_flags(engine), bad_loss.to(engine.device)])

    def _stop(self, engine: DeepSpeedEngine, flags: torch.Tensor) -> None:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)  # every rank has skipped, and comes here
        *of_parameters, bad_loss = flags.tolist()
        trained = [n for n, p in engine.module.named_parameters() if p.requires_grad]
        names = [name for name, flag in zip(trained, of_parameters, strict=True) if flag]
        error = self._watch.error(
            loss_scale_of(engine), engine.global_steps, rank(), names, bool(bad_loss)
        )
        if self.before_stop is not None:
            try:
                self.before_stop()
            except Exception as failure:
                raise error from failure
        raise error


def _step_and_norm(engine: DeepSpeedEngine, clip_grad: float, scale: float) -> torch.Tensor:
    if steps_client_optimizer(engine):
        return _step_client_optimizer(engine, clip_grad)
    # DeepSpeed's own wrappers clip by this attribute, and report the norm after the step.
    engine.optimizer.clip_grad = clip_grad
    with scale_held(engine):
        engine.step()
    norm = engine.get_global_grad_norm() if engine.was_step_applied() else math.inf
    if hasattr(engine.optimizer, 'loss_scale_config'):
        norm = norm / scale  # stage 0 reports it with the scale in it
    return torch.as_tensor(norm, device=engine.device).to(torch.float32)


def _step_client_optimizer(engine: DeepSpeedEngine, clip_grad: float) -> torch.Tensor:
    """Stage 0 with the client's own optimizer: DeepSpeed reports no norm and applies nan there."""
    with skipping_non_finite(engine) as grad_scaler:
        grad_scaler.unscale_(engine.optimizer)
        groups = engine.optimizer.param_groups
        params = [p for group in groups for p in group['params'] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params]).to(torch.float32)
        if clip_grad > 0:
            torch.nn.utils.clip_grads_with_norm_(params, clip_grad, norm)
        engine.step()
    return norm
