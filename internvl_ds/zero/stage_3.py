"""ZeRO stage 3: DeepSpeedZeroOptimizer_Stage3, and DeepSpeedZeRoOffload without an optimizer.

Stage 3 keeps small parameters, its persistent ones, whole on every rank between steps. Around a
save or a load DeepSpeed frees the whole copies, and then gathers them anew, one collective each:
with a hundred of them that takes longer than the copying of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, get_allgather_dtype

from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.zero.deepspeed_optimizer import ZeroOptimizer
from internvl_ds.zero.partition import Layout, Slices
from internvl_ds.zero.wrapper import Wrapper, replaced

# Of DeepSpeedZeRoOffload: the stream on which it gathers weights; None on CPUs.
_GATHERING = '__allgather_stream'


class Stage3Module(Wrapper):
    """An engine at ZeRO stage 3 without an optimizer."""

    @property
    def _offload(self) -> Any:
        """DeepSpeedZeRoOffload, which cuts the module's parameters up and gathers them."""
        return self.optimizer

    def owned_gradients(self) -> dict[torch.Tensor, torch.Tensor] | None:
        return None

    def release_gathered(self) -> None:
        self._offload.partition_all_parameters()

    def gather_persistent(self) -> None:
        """See `Wrapper`. In one collective where that is exact."""
        # The next forward pass gathers on a stream of its own, which waits for nobody's writes.
        get_accelerator().synchronize()
        persistent = self._offload.persistent_parameters
        freed = [p for p in persistent if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if freed and all(_is_sent_as_it_is(p) for p in freed):
            freed[0].all_gather_coalesced(freed).wait()
        elif freed:
            freed[0].all_gather(freed)


class Stage3(Stage3Module, ZeroOptimizer):
    """An engine at ZeRO stage 3: each parameter is cut by rank, and a group may be several."""

    OFFLOADED_IDS = '_offload_boundary_param_ids'
    HAND_OVER = '_finalize_offload_gradient_accumulation'

    @property
    def _offload(self) -> Any:
        return self.optimizer.parameter_offload

    def check_all_gradients(self) -> None:
        optimizer = self.optimizer
        update_scale = optimizer._overflow_check_and_loss_scale_update

        def check() -> bool:
            optimizer.check_overflow()
            return update_scale()

        if not self.engine.fp16_enabled():
            optimizer._overflow_check_and_loss_scale_update = check

    def flat_masters(self) -> Sequence[torch.Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def partitioning(self) -> tuple[Layout, int]:
        return Slices(self.shapes(), world_size()), rank()

    def push_masters(self) -> None:
        optimizer = self.optimizer
        optimizer.checkpoint_event_prologue()  # frees the whole copies of persistent parameters
        lows = optimizer.fp16_partitioned_groups_flat
        for index, (low, master) in enumerate(zip(lows, self.flat_masters(), strict=True)):
            low.data.copy_(master.data)
            optimizer._unflatten_partitioned_parameters(index)
        self.gather_persistent()

    def gather_persistent(self) -> None:
        self.optimizer.invalidate_secondary_tensor()  # stale copies within a node (hpZ)
        super().gather_persistent()

    def groups(self) -> list[list[Any]]:
        lists: list[list[Any]] = [[] for _ in self.optimizer.param_groups]
        for index, parameters in enumerate(self.optimizer.fp16_groups):
            lists[self.optimizer.sub_group_to_group_id[index]] += parameters
        return lists

    def slots(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        groups = self.client.param_groups  # between updates they hold no tensors
        return [
            (groups[self.optimizer.sub_group_to_group_id[index]], tensor)
            for index, tensor in enumerate(self.flat_masters())
        ]

    def owned_gradients(self) -> dict[torch.Tensor, torch.Tensor] | None:
        optimizer = self.optimizer
        # The buffers keep an old gradient; these two say whether a backward came after the step.
        is_new = getattr(optimizer, '_epilogue_ran_this_backward', False)  # not before 0.18
        if not (optimizer.micro_step_id > 0 or is_new):
            return None
        parameters = [p for group in optimizer.fp16_groups for p in group]
        return {p: optimizer.get_local_fp32_grad_for_param(p) for p in parameters}

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """See `Wrapper`. The next forward pass gathers what the step has written.

        DeepSpeed's own order of the two is its throughput timer, which waits for the whole device,
        and which `auto_values` turns off; or, where there are any, that of persistent parameters.
        """
        with super().stepping():
            yield
        stream = getattr(self._offload, f'_DeepSpeedZeRoOffload{_GATHERING}')
        if stream is not None:
            stream.wait_stream(get_accelerator().current_stream())

    def clear_gradients(self) -> None:
        self.optimizer.grad_partitions_flat_buffer.zero_()

    @property
    def _offloads(self) -> bool:
        return self.optimizer.offload_optimizer

    def _idle_parts(self, norms: Container[Any]) -> Iterator[torch.Tensor]:
        optimizer = self.optimizer
        for parameter in (p for group in optimizer.fp16_groups for p in group):
            identity = optimizer.get_param_id(parameter)
            if identity in norms:
                continue
            index, start, size = optimizer.grad_position[identity]
            gradient = optimizer.fp32_partitioned_groups_flat[index].grad
            if gradient is not None:
                yield gradient.narrow(0, start, size)

    @contextmanager
    def saving(self, defer: Callable[[Callable[[], None]], None]) -> Iterator[None]:
        """See `Wrapper`. The whole copies come back: a save changes no weight."""
        persistent = self._offload.persistent_parameters
        whole = [(p, p.data) for p in persistent if p.ds_status is ZeroParamStatus.AVAILABLE]

        def restore() -> None:
            for parameter, data in whole:
                parameter.data = data
                parameter.ds_status = ZeroParamStatus.AVAILABLE

        with super().saving(defer), replaced(self.optimizer, 'checkpoint_event_epilogue', restore):
            yield

    @contextmanager
    def loading(self, model_file: str) -> Iterator[None]:
        gather = replaced(self.optimizer, 'checkpoint_event_epilogue', self.gather_persistent)
        with super().loading(model_file), gather:
            yield


def _is_sent_as_it_is(parameter: Any) -> bool:
    """Whether one collective for all would bring the very values: torch autocast's rounds them."""
    part = parameter.ds_tensor
    rounds = get_allgather_dtype(parameter, part) != part.dtype
    return not (rounds or hasattr(part, 'ds_quant_scale'))
