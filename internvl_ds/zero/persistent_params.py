"""ZeRO-3's persistent parameters: small ones that every rank keeps whole between steps.

Around a save or a load DeepSpeed frees the whole copies, and then gathers them anew, one collective
each: with a hundred of them that takes longer than the copying of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, get_allgather_dtype


def gather_persistent(optimizer: Any) -> None:
    """Gathers the persistent parameters that are not whole, in one collective where it is exact.

    Every rank must call it, after the partitions have changed.

    Args:
        optimizer: stage 3's, or the DeepSpeedZeRoOffload of an engine without an optimizer.
    """
    if hasattr(optimizer, 'invalidate_secondary_tensor'):  # stale copies within a node (hpZ)
        optimizer.invalidate_secondary_tensor()
    parameters = [
        p for p in optimizer.persistent_parameters if p.ds_status is ZeroParamStatus.NOT_AVAILABLE
    ]
    if not parameters:
        return
    if all(_is_sent_as_it_is(p) for p in parameters):
        parameters[0].all_gather_coalesced(parameters).wait()
    else:
        parameters[0].all_gather(parameters)


def _is_sent_as_it_is(parameter: Any) -> bool:
    """Whether one collective for all would bring the very values: torch autocast's rounds them."""
    own = parameter.ds_tensor
    return get_allgather_dtype(parameter, own) == own.dtype and not hasattr(own, 'ds_quant_scale')


@contextmanager
def gathered_together(engine: DeepSpeedEngine) -> Iterator[None]:
    """Has ``engine.load_checkpoint``, called meanwhile, end with `gather_persistent`."""
    optimizer: Any = engine.optimizer
    with _epilogue(optimizer, lambda: gather_persistent(optimizer)):
        yield


@contextmanager
def put_back(engine: DeepSpeedEngine) -> Iterator[None]:
    """Has ``engine.save_checkpoint``, called meanwhile, end with the whole copies that were there.

    A save changes no weight, so there is nothing to gather.
    """
    optimizer: Any = engine.optimizer
    whole = [
        (parameter, parameter.data)
        for parameter in getattr(optimizer, 'persistent_parameters', ())
        if parameter.ds_status is ZeroParamStatus.AVAILABLE
    ]

    def restore() -> None:
        for parameter, data in whole:
            parameter.data = data
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    with _epilogue(optimizer, restore):
        yield


@contextmanager
def _epilogue(optimizer: Any, action: Any) -> Iterator[None]:
    """Replaces what DeepSpeed calls at the end of a save or load, where it calls anything."""
    if not hasattr(optimizer, 'checkpoint_event_epilogue'):
        yield
        return
    optimizer.checkpoint_event_epilogue = action
    try:
        yield
    finally:
        del optimizer.checkpoint_event_epilogue
