"""The memory that a configuration needs on each rank, and the largest micro-batch for it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.ds import resolve as ds
from internvl_ds.tools.plan.activations import Step, Timeline, watch_step
from internvl_ds.tools.plan.sizes import Sizes, meta_model, sizes_of, with_recompute
from internvl_ds.tools.plan.static_memory import (
    FP32_BYTES,
    Parts,
    built_bytes,
    module_bytes,
    static_host_parts,
    static_parts,
)
from internvl_ds.tools.plan.transient_memory import in_backward, in_update, in_update_on_host
from internvl_ds.tools.plan.zero_scheme import ZeroScheme, scheme_of
from internvl_ds.train.data import build_mixup
from internvl_ds.train.objective.criterion import build_criterion
from internvl_ds.train.objective.distill import joined, teacher_config


@dataclass(frozen=True)
class Need:
    """Bytes that one rank needs."""

    micro_batch: int  # images that it is for
    device: int  # at most, on the GPU
    host: int  # under offload, in the host's memory, with what the optimizer takes there
    build: int  # in the host's memory while the model is built, before there is an engine
    parts: Parts  # of ``device``, at the moment in forward and backward when they are most
    static: Parts  # the part that stays from one update to the next
    host_parts: Parts  # of ``host``, between two updates
    # what the optimizer's update has on the device beside weights and states; it counts where it is
    # more than the gradients, buffers and activations of ``parts``
    update: int


class MemoryPlanner:
    """Computes the memory of a configured run, without allocating any.

    It measures the model at first use, once for each precision, with and without activation
    checkpointing.
    """

    def __init__(self, config: CfgNode, *, gpu: bool = True) -> None:
        """Plans for a yacs tree (MODEL, DATA.IMG_SIZE, TRAIN, AUG), on GPUs or on CPUs."""
        self._config = config
        self._on_gpu = gpu
        self._steps: dict[tuple[bool, str], Step] = {}

    @property
    def keeps_ema(self) -> bool:
        """Whether the run averages its weights."""
        return bool(self._config.TRAIN.EMA.ENABLE)

    @property
    def copies_saves(self) -> bool:
        """Whether saves are written from a copy in the host's memory."""
        return bool(self._config.CHECKPOINT.ASYNC)

    @property
    def step_of_micro_batch(self) -> int:
        """The number that divides every micro-batch: 2 with mixup, else 1."""
        return 1 if build_mixup(self._config) is None else 2

    @functools.cached_property
    def sizes(self) -> Sizes:
        """The model's elements.

        Raises:
            ConfigError: for a model or optimizer that cannot be built.
        """
        config = with_recompute(self._config, False)
        return sizes_of(meta_model(config), config)

    @functools.cached_property
    def teacher(self) -> nn.Module | None:
        """The model TRAIN.DISTILL.TEACHER, on the meta device, whole on each rank; None without.

        Raises:
            ConfigError: for a model that cannot be built.
        """
        config = teacher_config(self._config)
        return None if config is None else meta_model(config).requires_grad_(False).eval()

    def need(self, resolved: Mapping[str, Any], ranks: int, *, recompute: bool) -> Need:
        """The need of a resolved ds_config on each rank; ``recompute`` is TRAIN.USE_CHECKPOINT.

        Raises:
            ConfigError: for a model that cannot be built, recomputed or run without data.
        """
        return self.need_of(self.scheme(resolved, ranks), recompute=recompute)

    def scheme(self, resolved: Mapping[str, Any], ranks: int) -> ZeroScheme:
        """The scheme of a resolved ds_config on so many ranks."""
        return scheme_of(resolved, ranks, self.sizes.trained, self._on_gpu)

    def need_of(self, scheme: ZeroScheme, *, recompute: bool) -> Need:
        """As `need`, of a scheme."""
        sizes, ema = self.sizes, self.keeps_ema
        step = self.step_of(scheme, recompute=recompute)
        stays, passes = static_parts(sizes, scheme, ema), in_backward(sizes, scheme, step)
        teacher = 0 if self.teacher is None else module_bytes(self.teacher, scheme.weight_bytes)
        stays = replace(stays, weights=stays.weights + teacher)
        update = in_update(sizes, scheme)
        in_float32 = 0 if self.teacher is None else module_bytes(self.teacher, FP32_BYTES)
        host = static_host_parts(sizes, scheme, ema)
        parts = Parts(*map(sum, zip(vars(stays).values(), vars(passes).values(), strict=True)))
        return Need(
            micro_batch=scheme.micro_batch,
            device=stays.total + max(passes.total, update),
            host=host.total + in_update_on_host(sizes, scheme),
            build=built_bytes(sizes, scheme, self._config.TRAIN.SHARDED_BUILD) + in_float32,
            parts=parts,
            static=stays,
            host_parts=host,
            update=update,
        )

    def step_of(self, scheme: ZeroScheme, *, recompute: bool) -> Timeline:
        """The memory of a training step of the scheme's micro-batch and precision, over time."""
        # What fp16 and bf16 allocate is the same.
        twins = {ds.FP16: ds.BF16, ds.AUTOCAST_FP16: ds.AUTOCAST_BF16}
        key = recompute, twins.get(scheme.precision, scheme.precision)
        if key not in self._steps:
            model = meta_model(with_recompute(self._config, recompute))
            self._steps[key] = watch_step(
                model, self._config.DATA.IMG_SIZE, key[1], self._loss,
                gpu=self._on_gpu, teacher=self.teacher,
            )  # fmt: skip
        return self._steps[key].at(scheme.micro_batch)

    def largest_micro_batch(
        self, scheme: ZeroScheme, device_bytes: float, *, recompute: bool
    ) -> int:
        """The largest micro-batch, in images, that fits the device; 0 if none does.

        The scheme's own micro-batch is not read; ``recompute`` is as for `need`.
        """

        def fits(steps: int) -> bool:
            larger = replace(scheme, micro_batch=steps * step)
            return self.need_of(larger, recompute=recompute).device <= device_bytes

        step, most = self.step_of_micro_batch, 1
        while most <= _MOST_IMAGES and fits(most):
            most *= 2
        least = most // 2
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if fits(middle) else (least, middle)
        return least * step

    def _loss(self, logits: torch.Tensor, theirs: torch.Tensor | None) -> torch.Tensor:
        """The training loss of the loop, with targets of its shape."""
        soft = build_mixup(self._config) is not None
        images, classes = logits.shape
        targets = torch.zeros(images, classes) if soft else torch.zeros(images, dtype=torch.long)
        criterion = build_criterion(self._config, soft_targets=soft)
        loss: torch.Tensor = criterion(logits, targets)
        return loss if theirs is None else joined(self._config.TRAIN.DISTILL, loss, logits, theirs)


_MOST_IMAGES = 1 << 20  # no run has a larger micro-batch; where it would fit, memory is no limit
