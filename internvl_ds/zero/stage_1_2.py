"""ZeRO stages 1 and 2: DeepSpeedZeroOptimizer."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.zero.deepspeed_optimizer import ZeroOptimizer
from internvl_ds.zero.partition import Layout, Runs


class Stage1And2(ZeroOptimizer):
    """An engine at ZeRO stage 1 or 2: each group of parameters is one flat tensor, cut by rank."""

    OFFLOADED_IDS = '_offload_accumulated_param_ids'
    HAND_OVER = '_finalize_cpu_offload_gradient_accumulation'

    def attach(self) -> None:
        super().attach()
        optimizer = self.optimizer
        if self.stage == 1 and optimizer.overlap_comm:
            optimizer.reduce_gradients = functools.partial(
                _reduce_gradients, weakref.ref(optimizer)
            )

    def flat_masters(self) -> Sequence[torch.Tensor]:
        return self.optimizer.single_partition_of_fp32_groups

    def partitioning(self) -> tuple[Layout, int]:
        # DeepSpeed before 0.19 has no gaps, and floats for sizes.
        gaps = getattr(self.optimizer, 'round_robin_bit16_padding', None)
        sizes = [int(size) for size in self.optimizer.partition_size]
        return Runs(self.shapes(), gaps, sizes, world_size()), rank()

    def push_masters(self) -> None:
        self.optimizer.update_lp_params()

    def unpadded(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.optimizer._get_groups_without_padding(tensors)

    def groups(self) -> list[list[Any]]:
        return self.optimizer.bit16_groups

    def owned_gradients(self) -> dict[torch.Tensor, torch.Tensor] | None:
        optimizer = self.optimizer
        owned: dict[torch.Tensor, torch.Tensor] = {}
        for index, parameters in enumerate(optimizer.params_in_partition):
            if self._offloads:
                # The buffers keep an old gradient; the norms of its parts go with the step.
                if not optimizer.norm_for_param_grads and any(optimizer.params_in_partition):
                    return None
                parts = optimizer.offload_gradient_dict[index]
            else:
                averaged = optimizer.averaged_gradients.get(index)
                if averaged is None:
                    return None
                parts = [part for part in averaged if not hasattr(part, '_zero_padding')]
            owned.update(zip(parameters, parts, strict=False))  # padding may be the last part
        return owned

    def drop_gradients(self) -> None:
        super().drop_gradients()
        for gradients in (self.optimizer.averaged_gradients, self.optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))

    def clear_gradients(self) -> None:
        if self._offloads:
            for buffer in self.optimizer.accumulated_grads_in_cpu.values():
                buffer.zero_()

    @property
    def _offloads(self) -> bool:
        return self.optimizer.cpu_offload

    def _idle_parts(self, norms: Container[Any]) -> Iterator[torch.Tensor]:
        for index, parameters in enumerate(self.optimizer.params_in_partition):
            parts = self.optimizer.offload_gradient_dict[index]
            for parameter, part in zip(parameters, parts, strict=False):
                if self.optimizer.get_param_id(parameter) not in norms:
                    yield part


class Stage1And2Before018(Stage1And2):
    """The same before DeepSpeed 0.18."""

    def attach(self) -> None:
        self.optimizer.__class__ = _Mended
        super().attach()
        if self.engine.torch_autocast_enabled():
            # DeepSpeed would put a larger parameter into a bucket that cannot hold it.
            largest = max(p.numel() for group in self.groups() for p in group)
            self.optimizer.reduce_bucket_size = max(self.optimizer.reduce_bucket_size, largest)


class _Mended(DeepSpeedZeroOptimizer):
    """What trains otherwise in DeepSpeed 0.17.6."""

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        """On any rank; by itself a rank of stage 1 skips what the others apply."""
        return super().has_overflow(True)

    def get_all_grad_tensors(self, tensor_list: list[Any], dtype: torch.dtype) -> list[Any]:
        """A micro-batch's, added to those before it, in whose place DeepSpeed puts them."""
        gradients = super().get_all_grad_tensors(tensor_list, dtype)
        index = next(i for i, own in enumerate(self.params_in_partition) if own is tensor_list)
        earlier = self.all_grad_tensors.get(index)
        if not earlier:
            return gradients
        torch._foreach_add_(earlier, gradients)
        return earlier

    def get_flat_partition(
        self, tensor_list: list[Any], first_offset: float, partition_size: float, **kwargs: Any
    ) -> list[torch.Tensor]:
        """Padding alone where this rank has no parameter of a group; DeepSpeed takes the first."""
        if not tensor_list:
            padding = torch.zeros(int(partition_size), dtype=kwargs['dtype'])
            return [padding.to(kwargs['device'])]
        return super().get_flat_partition(tensor_list, first_offset, partition_size, **kwargs)


def _reduce_gradients(ref: weakref.ref[Any], *args: Any, **kwargs: Any) -> None:
    """Replaces the ``reduce_gradients`` of stage 1 with overlap, at an update's last micro-batch.

    DeepSpeed 0.19.8 reduces there in the backward's hooks alone (stage_1_and_2.py:971): a gradient
    of an earlier micro-batch, of a parameter without a part in the last, would be applied as each
    rank has it.
    """
    optimizer = ref()
    assert optimizer is not None
    waiting = {i for bucket in optimizer.ipg_buckets.values() for _, _, i in bucket.params}
    for index, group in enumerate(optimizer.bit16_groups):
        for parameter in group:
            number = optimizer.get_param_id(parameter)
            if number in waiting or optimizer.params_already_reduced[number]:
                continue
            if optimizer.get_gradient_for_reduction(parameter) is not None:
                optimizer.reduce_ready_partitions_and_remove_grads(parameter, index)
    type(optimizer).reduce_gradients(optimizer, *args, **kwargs)
