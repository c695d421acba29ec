"""The gradients that ZeRO keeps between a backward and the step: completed, dropped, cleared.

DeepSpeed 0.19.8 leaves old gradients in its buffers for the next backward to overwrite. So where a
parameter takes no part in the next update, its last gradient is applied again (at stage 3, and with
offload at any); and with offload a parameter without a part in an update's last micro-batch gets
nothing applied.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine


def begin_backward(engine: DeepSpeedEngine) -> None:
    """Has the next backward add to what the ones before it have left, as in plain PyTorch.

    Stage 3 adds only where a forward of the engine came in between: it overwrote the gradients of a
    first loss where two forwards came before two backwards, or the forward was the module's.
    """
    if engine.zero_optimization_stage():
        engine.optimizer.clear_backward_seen_flag()


def drop_gradients(engine: DeepSpeedEngine) -> None:
    """Forgets what all micro-batches since the last update have left. Talks to no other rank.

    At stage 0 that is ``p.grad`` alone, which any ``zero_grad`` has emptied.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if not stage:
        return
    type(optimizer).zero_grad(optimizer)
    if stage < 3:
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            kept.update(dict.fromkeys(kept))
    clear_buffers(engine)


def complete_gradients(engine: DeepSpeedEngine) -> None:
    """Before a step with offload: hands over what the last micro-batch of an update did not.

    That is the gradient of each parameter that had no part in it; zero where none of the update's
    had one.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if not _offloads(optimizer, stage):
        return
    name = '_offload_boundary_param_ids' if stage == 3 else '_offload_accumulated_param_ids'
    seen = getattr(optimizer, name)
    late = seen - optimizer.norm_for_param_grads.keys()
    if late:
        setattr(optimizer, name, late)
        if stage == 3:
            optimizer._finalize_offload_gradient_accumulation()
        else:
            optimizer._finalize_cpu_offload_gradient_accumulation()
        setattr(optimizer, name, seen)
    find = _untouched_at_3 if stage == 3 else _untouched
    for part in find(optimizer, optimizer.norm_for_param_grads):
        part.zero_()


def clear_buffers(engine: DeepSpeedEngine) -> None:
    """After a step: empties the buffers that the next backward may add to."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.grad_partitions_flat_buffer.zero_()
    elif _offloads(optimizer, stage):
        for buffer in optimizer.accumulated_grads_in_cpu.values():
            buffer.zero_()


def _offloads(optimizer: Any, stage: int) -> bool:
    return bool(stage and (optimizer.offload_optimizer if stage == 3 else optimizer.cpu_offload))


def _untouched(optimizer: Any, touched: Container[Any]) -> Iterator[torch.Tensor]:
    """What the optimizer on the CPU will read as the gradients of parameters of other ids."""
    for index, parameters in enumerate(optimizer.params_in_partition):
        parts = optimizer.offload_gradient_dict[index]
        for parameter, part in zip(parameters, parts, strict=False):
            if optimizer.get_param_id(parameter) not in touched:
                yield part


def _untouched_at_3(optimizer: Any, touched: Container[Any]) -> Iterator[torch.Tensor]:
    """The same at stage 3; what is swapped out to NVMe is left out."""
    for parameter in (p for group in optimizer.fp16_groups for p in group):
        identity = optimizer.get_param_id(parameter)
        if identity in touched:
            continue
        index, start, size = optimizer.grad_position[identity]
        gradient = optimizer.fp32_partitioned_groups_flat[index].grad
        if gradient is not None and not optimizer._swappable_optimizer_subgroup(index):
            yield gradient.narrow(0, start, size)
