"""The loss scale that a ds_config configures.

DeepSpeed 0.19.8 keeps the scale in four places, moves it by three rules, and moves it in the middle
of a step, between the norm and the division by it (stage_1_and_2.py:3047, stage3.py:2892). Here one
`LossScale` moves after the step, and each `Wrapper` sets it in its place.
"""

from __future__ import annotations

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.zero.loss_scale import LossScale


def configured_scale(engine: DeepSpeedEngine) -> LossScale | None:
    """As the ds_config's /fp16 section says, which holds for torch autocast in float16 too.

    Returns:
        None where nothing is scaled.
    """
    autocast = engine.torch_autocast_enabled()
    if not (engine.fp16_enabled() or (autocast and engine.torch_autocast_dtype() == torch.float16)):
        return None
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
