"""Where an engine keeps its loss scale: read from there at registration, and kept up to date there.

DeepSpeed 0.19.8 keeps it in four places, moves it by three rules, and moves it in the middle of a
step, between the norm and the division by it (stage_1_and_2.py:3047, stage3.py:2892). Here one
`LossScale` moves after the step, and these places are told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

from internvl_ds.zero.loss_scale import LossScale


def steps_client_optimizer(engine: DeepSpeedEngine) -> bool:
    """Whether the engine calls the client's own optimizer: stage 0 in fp32 or torch autocast."""
    return engine.optimizer is engine.basic_optimizer


def attach(engine: DeepSpeedEngine) -> LossScale | None:
    """Makes a new engine's backward and step use one loss scale.

    Returns:
        The scale; None where nothing is scaled.
    """
    if engine.optimizer is None or engine.basic_optimizer is None:
        return None
    scale = _configured(engine) if _scales(engine) else None
    optimizer = engine.optimizer
    if getattr(optimizer, 'torch_autocast_gradscaler', None) is not None:
        # Under torch autocast in float16 DeepSpeed makes a GradScaler here, whose factor its norm
        # and its clipping do not know; and it makes one for every later engine of the process too,
        # whatever that trains in.
        optimizer.torch_autocast_gradscaler = None
    if scale is not None and engine.torch_autocast_enabled() and engine.zero_optimization_stage():
        # A loss_scaler is what they know.
        optimizer.dynamic_loss_scale = scale.dynamic
        optimizer.loss_scaler = _new_loss_scaler(engine, scale)
    if scale is not None:
        push(engine, scale)
    return scale


def scale_loss(engine: DeepSpeedEngine, loss: torch.Tensor) -> torch.Tensor:
    """The loss to give to ``engine.backward``, which does the rest of the scaling.

    At stage 0 in fp16 it does none (engine.py:3417 of DeepSpeed 0.19.8 scales for ZeRO optimizers
    only), while the step divides by the scale.
    """
    config = getattr(engine.optimizer, 'loss_scale_config', None)
    return loss if config is None or config.cur_scale == 1.0 else loss.float() * config.cur_scale


def push(engine: DeepSpeedEngine, scale: LossScale) -> None:
    """Tells DeepSpeed the scale, in the fields that its own rule would have moved."""
    optimizer = engine.optimizer
    if steps_client_optimizer(engine):
        _set_grad_scaler(engine.torch_autocast_z0_gradscaler, scale.scale)
        return
    holder = _holder(optimizer)
    holder.cur_scale = scale.scale
    if scale.dynamic:
        # DeepSpeed grows when cur_iter - last_overflow_iter - 1 is a multiple of its window.
        holder.cur_iter = engine.global_steps
        holder.last_overflow_iter = holder.cur_iter - scale.growth_tracker - 2
        if hasattr(holder, 'cur_hysteresis'):
            holder.cur_hysteresis = scale.hysteresis_left


def pull(engine: DeepSpeedEngine, scale: LossScale) -> None:
    """Takes over what DeepSpeed's own load has put into those fields, and puts settings back."""
    optimizer = engine.optimizer
    if not steps_client_optimizer(engine) and scale.dynamic:
        holder = _holder(optimizer)
        successes = holder.cur_iter - (holder.last_overflow_iter or -1) - 2
        scale.load_state_dict(
            {
                'scale': holder.cur_scale,
                '_growth_tracker': max(0, successes) % scale.growth_interval,
                'hysteresis_left': getattr(holder, 'cur_hysteresis', 1),
            }
        )
    if not steps_client_optimizer(engine) and engine.zero_optimization_stage():
        optimizer.loss_scaler = _new_loss_scaler(engine, scale)
    push(engine, scale)


@contextmanager
def scale_held(engine: DeepSpeedEngine) -> Iterator[None]:
    """Keeps DeepSpeed from moving the scale while a step still divides by it."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, '_update_scale'):
        yield
        return
    optimizer._update_scale = _leave_scale
    try:
        yield
    finally:
        del optimizer._update_scale


@contextmanager
def skipping_non_finite(engine: DeepSpeedEngine) -> Iterator[torch.amp.GradScaler]:
    """For a step of the client's optimizer: torch's GradScaler decides whether it steps.

    In fp32 and bf16 too, where the engine would apply what is not finite; a scale of 1 changes no
    bit of the gradients. The decision is read from the device once, by GradScaler.

    Yields:
        The GradScaler, whose ``unscale_`` the caller must call before ``engine.step``.
    """
    optimizer, own = engine.optimizer, engine.torch_autocast_z0_gradscaler
    scaler = own
    if scaler is None:
        scaler = torch.amp.GradScaler(engine.device.type, init_scale=1.0)
        scaler.scale(torch.zeros((), device=engine.device))  # makes its scale tensor

    def stepped(optimizer: Any, args: Any, kwargs: Any) -> None:
        optimizer.overflow = False

    # A fused optimizer would be called for every step and decide on the device, where nobody sees
    # whether it stepped; the scheduler and the count of skipped steps need that.
    supports = vars(optimizer).get('_step_supports_amp_scaling')
    optimizer._step_supports_amp_scaling = False
    optimizer.overflow = True  # by this the engine counts a step as skipped
    hook = optimizer.register_step_post_hook(stepped)
    clip, engine._config.gradient_clipping = engine._config.gradient_clipping, 0.0
    engine.torch_autocast_z0_gradscaler = scaler
    try:
        yield scaler
    finally:
        engine.torch_autocast_z0_gradscaler = own
        engine._config.gradient_clipping = clip
        hook.remove()
        del optimizer.overflow
        if supports is None:
            del optimizer._step_supports_amp_scaling
        else:
            optimizer._step_supports_amp_scaling = supports


def _leave_scale(has_overflow: bool = False) -> None:
    """Stands for the optimizer's ``_update_scale`` during a step."""


def _holder(optimizer: Any) -> Any:
    """What one of DeepSpeed's optimizers keeps its scale in: at stages 1 to 3, or at stage 0."""
    return getattr(optimizer, 'loss_scaler', None) or optimizer.loss_scale_config


def _new_loss_scaler(engine: DeepSpeedEngine, scale: LossScale) -> Any:
    return CreateLossScaler(
        torch.float16, scale.scale, scale.dynamic, engine.dynamic_loss_scale_args()
    )


def _scales(engine: DeepSpeedEngine) -> bool:
    in_autocast = engine.torch_autocast_enabled()
    return engine.fp16_enabled() or (in_autocast and engine.torch_autocast_dtype() == torch.float16)


def _configured(engine: DeepSpeedEngine) -> LossScale:
    """As the ds_config's /fp16 section says, which holds for torch autocast in float16 too."""
    settings = engine._config.float16_config
    dynamic = engine.dynamic_loss_scale()
    return LossScale(
        scale=float(engine.initial_dynamic_scale() if dynamic else engine.loss_scale()),
        dynamic=dynamic,
        growth_interval=settings.loss_scale_window,
        hysteresis=settings.hysteresis,
        hysteresis_left=settings.hysteresis,
        consecutive_hysteresis=settings.consecutive_hysteresis,
        min_scale=float(settings.min_loss_scale),
    )


def _set_grad_scaler(scaler: torch.amp.GradScaler, scale: float) -> None:
    """Its own growth is off: `LossScale` decides. (``update(scale)`` wants a backward before.)"""
    scaler.load_state_dict(
        {
            'scale': scale,
            'growth_factor': 2.0,
            'backoff_factor': 0.5,
            'growth_interval': 2**31 - 1,
            '_growth_tracker': 0,
        }
    )
