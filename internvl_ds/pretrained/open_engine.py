"""Opens the module of an engine that has not trained yet, for pretrained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from internvl_ds.engine.registry import registration_of, wrapper_of
from internvl_ds.errors import PretrainedError


@contextmanager
def open_engine(engine: DeepSpeedEngine) -> Iterator[nn.Module]:
    """Yields the module to write into; then sets the fp32 masters to the written values.

    Collective: every rank enters and leaves it.

    Raises:
        PretrainedError: for an engine that has trained.
    """
    wrapper = wrapper_of(engine)
    if engine.global_steps or registration_of(engine).accumulation.micro_batches:
        raise PretrainedError(
            'load_pretrained after the first update: the optimizer goes on from other weights. '
            'Call it before training; load_checkpoint (MODEL.RESUME) goes on with a run'
        )
    wrapper.before_write()
    wrapper.release_gathered()
    try:
        yield engine.module
    finally:
        wrapper.gather_persistent()
    wrapper.pull_masters()
