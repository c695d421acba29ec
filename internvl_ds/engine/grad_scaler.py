"""The loss-scaler bridge: GradScaler's calling convention over engine.backward and engine.step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.dist.rendezvous import rank
from internvl_ds.engine.grad_norm import get_grad_norm, non_finite_flags
from internvl_ds.engine.overflow import OverflowWatch
from internvl_ds.engine.registry import engine_of, registration_of, wrapper_of
from internvl_ds.engine.scheduling import require_schedule_untouched, step_scheduler
from internvl_ds.errors import ConfigError
from internvl_ds.zero.loss_scale import require_scaler_state
from internvl_ds.zero.passes.unused import restore_idle

__all__ = ['NativeScalerWithGradNormCount', 'get_grad_norm']


class NativeScalerWithGradNormCount:
    """Backward, and on a boundary: clip, step, and report the gradient norm.

    Collective: every rank calls it. The caller divides the loss by the accumulation steps and marks
    the boundary with ``update_grad``; the engine neither divides again nor counts otherwise.

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
        self._engine: Callable[[], DeepSpeedEngine | None] = lambda: None
        self._early_state: Mapping[str, Any] = {}  # until the engine is known
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
        wrapper, accumulation = wrapper_of(engine), registration_of(engine).accumulation
        wrapper.require_unfrozen()
        wrapper.require_own_weights('an update')
        require_schedule_untouched(engine)
        if update_grad:
            accumulation.require_agreed(engine.gradient_accumulation_steps(), engine.global_steps)
        accumulation.add(loss)
        wrapper.begin_backward()
        engine.set_gradient_accumulation_boundary(update_grad)
        engine.backward(wrapper.scale_loss(loss), scale_wrt_gas=False)
        if not update_grad:
            engine.step()  # counts the micro-batch; no update off a boundary
            return None
        return self._update(engine, float(clip_grad or 0.0))

    @property
    def loss_scale(self) -> float:
        """What the losses are multiplied by; 1.0 without a scale, or before it is known."""
        scale = wrapper_of(engine).scale if (engine := self._engine()) is not None else None
        return float(self._early_state.get('scale', 1.0)) if scale is None else scale.scale

    def state_dict(self) -> dict[str, Any]:
        """The state of torch's GradScaler (``scale``, ``_growth_tracker``, ...) with the hysteresis
        and the last update's micro-batches; ``scale`` is 1.0 without a loss scale. At ZeRO stages 1
        to 3 also the names of parameters without a gradient so far, where there are any.
        """
        engine = self._engine()
        if engine is None:
            return {'scale': 1.0, **self._early_state}
        wrapper = wrapper_of(engine)
        state: dict[str, Any] = (
            {'scale': 1.0} if wrapper.scale is None else wrapper.scale.state_dict()
        )
        if wrapper.idle:
            state['idle'] = sorted(wrapper.idle)
        return {**state, 'micro_batches': registration_of(engine).accumulation.last_group}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Accepts `state_dict`'s result or a GradScaler's, at once or with the first call.

        In fp32 and bf16 there is no scale to restore, and a static one stays as configured.

        Raises:
            InternvlDsError: for what is neither.
        """
        require_scaler_state(state_dict)
        self._early_state = dict(state_dict)
        engine = self._engine()
        if engine is not None:
            self._restore(engine)

    def _attach(self, engine: DeepSpeedEngine) -> None:
        if self._engine() is not engine:
            self._engine = weakref.ref(engine)
            self._restore(engine)

    def _restore(self, engine: DeepSpeedEngine) -> None:
        if self._early_state:
            wrapper = wrapper_of(engine)
            wrapper.restore_scale(self._early_state)
            restore_idle(wrapper, self._early_state.get('idle'))
            registration_of(engine).accumulation.last_group = self._early_state.get('micro_batches')
        self._early_state = {}

    def _update(self, engine: DeepSpeedEngine, clip_grad: float) -> torch.Tensor:
        registration = registration_of(engine)
        wrapper, limit = registration.wrapper, registration.overflow_limit
        scale = wrapper.scale
        factor = 1.0 if scale is None else scale.scale
        # Which parameters overflow is gone after the step, so it is looked at before.
        flags = self._flags(engine) if self._watch.would_stop(scale, limit) else None
        norm = wrapper.step(clip_grad)
        self.step_was_skipped = not engine.was_step_applied()
        if scale is not None:
            scale.update(self.step_was_skipped)
            wrapper.push_scale()
        losses = registration.accumulation.finish(engine.gradient_accumulation_steps())
        self._watch.record(losses, norm, factor, self.step_was_skipped)
        step_scheduler(engine, self.step_was_skipped)
        if self.step_was_skipped and flags is not None:
            self._stop(engine, flags)
        return norm

    def _flags(self, engine: DeepSpeedEngine) -> torch.Tensor:
        """Whether each parameter's gradient, and at last the loss, is not finite on this rank."""
        losses = registration_of(engine).accumulation.losses
        loss = torch.stack([loss.float() for loss in losses]).sum()
        bad_loss = (~torch.isfinite(loss)).float().view(1)
        return torch.cat([non_finite_flags(engine), bad_loss.to(engine.device)])

    def _stop(self, engine: DeepSpeedEngine, flags: torch.Tensor) -> None:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)  # every rank has skipped, and comes here
        *of_parameters, bad_loss = flags.tolist()
        trained = [n for n, p in engine.module.named_parameters() if p.requires_grad]
        names = [name for name, flag in zip(trained, of_parameters, strict=True) if flag]
        error = self._watch.error(
            wrapper_of(engine).scale, engine.global_steps, rank(), names, bool(bad_loss)
        )
        if self.before_stop is not None:
            try:
                self.before_stop()
            except Exception as failure:
                raise error from failure
        raise error
