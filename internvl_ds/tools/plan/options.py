"""The ways to train a model, the memory of each, and the fastest that fits."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from yacs.config import CfgNode

from internvl_ds.config.ds import resolve as ds
from internvl_ds.tools.plan.memory_planner import MemoryPlanner, Need
from internvl_ds.tools.plan.sizes import can_recompute
from internvl_ds.tools.plan.static_memory import checkpoint_bytes, snapshot_bytes
from internvl_ds.tools.plan.zero_scheme import ZeroScheme

# The share of a host's memory that is planned with; the rest is for the system and data loaders.
USABLE_ON_HOST = 0.9
# Of a GPU's memory CUDA takes some for each process (its context and kernels), NCCL for channels to
# other ranks (0.5 to 1.5 GB), and cuBLAS for its workspace. Allocations waste a share, a small one
# with expandable segments (see `take_device`). Rules of thumb, no measurements.
_CUDA, _NCCL, _CUBLAS = 500_000_000, 1_000_000_000, 32 << 20
_USABLE_OF_THE_REST = 0.95

NONE, OPTIMIZER, ALL = 'none', 'optimizer', 'all'
_OFFLOADS = {0: (NONE,), 1: (NONE, OPTIMIZER), 2: (NONE, OPTIMIZER), 3: (NONE, OPTIMIZER, ALL)}
_TO_CPU = {'device': 'cpu', 'pin_memory': True}

# A rule for choosing, no measurement: how much longer an update takes.
_STAGE_COST = {0: 1.0, 1: 1.0, 2: 1.02, 3: 1.15}
_OFFLOAD_COST = {NONE: 1.0, OPTIMIZER: 1.5, ALL: 2.0}
_RECOMPUTE_COST = 1.3
_IDLE_IMAGES = 2.0  # a GPU idles with micro-batches of few images as if it had these more


@dataclass(frozen=True)
class Machine:
    """The GPUs, hosts and disk to train on."""

    gpus: int  # data-parallel ranks
    gpu_bytes: int  # memory of each
    gpus_per_host: int  # of them that share a host
    host_bytes: int | None  # memory of a host; None for no limit
    disk_rate: float  # bytes a second that all ranks together write

    @property
    def taken(self) -> int:
        """Bytes of a GPU that are not torch's."""
        return _CUDA + _CUBLAS + (_NCCL if self.gpus > 1 else 0)

    @property
    def usable(self) -> int:
        """Bytes of a GPU that are planned with."""
        return max(0, int(_USABLE_OF_THE_REST * (self.gpu_bytes - self.taken)))


@dataclass(frozen=True)
class Option:
    """One way to train."""

    stage: int  # of ZeRO
    offload: str  # 'none', 'optimizer', or 'all' for the parameters too
    recompute: bool  # with activation checkpointing
    need: Need  # of the configured micro-batch
    largest_micro_batch: int  # images that fit; 0 where none does
    host_bytes: int  # on each host, at most
    fits_host: bool  # whether a host has that
    micro_batch: int  # images to train with, so that the configured batch stays; 0 where none fits
    accumulation: int  # micro-batches of an update with them
    checkpoint_bytes: int  # of a tag
    save_seconds: float  # to write it

    @property
    def fits(self) -> bool:
        """Whether both the device and the host have the memory."""
        return self.micro_batch > 0 and self.fits_host

    @property
    def name(self) -> str:
        """In words."""
        offload = {NONE: '', OPTIMIZER: ' with the optimizer offloaded', ALL: ' with offload'}
        recompute = ' and activation checkpointing' if self.offload != NONE else ''
        recompute = recompute or ' with activation checkpointing'
        return f'ZeRO stage {self.stage}{offload[self.offload]}' + recompute * self.recompute


def options(
    planner: MemoryPlanner, config: CfgNode, base: Mapping[str, Any], machine: Machine
) -> list[Option]:
    """Plans stages 0 to 3, with and without offload and activation checkpointing.

    The other settings of the ds_config ``base`` stay.

    Raises:
        ConfigError: for settings that disagree, or a model that cannot be planned.
    """
    ways = []
    recomputes = (False, True) if can_recompute(config) else (False,)
    for stage, offloads in _OFFLOADS.items():
        for offload in offloads:
            resolved = ds.resolve_or_raise(variant(base, stage, offload), config, machine.gpus)
            ways += [_option(planner, resolved, offload, again, machine) for again in recomputes]
    return ways


def variant(base: Mapping[str, Any], stage: int, offload: str) -> dict[str, Any]:
    """A ds_config with another stage and offload."""
    tree = copy.deepcopy(dict(base))
    zero = dict(tree.get('zero_optimization', {}))
    for key in ('offload_optimizer', 'offload_param'):
        zero.pop(key, None)
    tree['zero_optimization'] = {**zero, **section(stage, offload)}
    if offload != NONE:
        tree['zero_force_ds_cpu_optimizer'] = False
    return tree


def section(stage: int, offload: str) -> dict[str, Any]:
    """/zero_optimization of a stage and an offload: `NONE`, `OPTIMIZER` or `ALL`."""
    tree: dict[str, Any] = {'stage': stage}
    if offload != NONE:
        tree['offload_optimizer'] = dict(_TO_CPU)
    if offload == ALL:
        tree['offload_param'] = dict(_TO_CPU)
    return tree


def choose(ways: Sequence[Option]) -> Option | None:
    """The option to take: what fits and, by a rule of thumb, trains fastest; None if none fits."""
    return min((option for option in ways if option.fits), key=_cost, default=None)


def _option(
    planner: MemoryPlanner,
    resolved: Mapping[str, Any],
    offload: str,
    recompute: bool,
    machine: Machine,
) -> Option:
    scheme = planner.scheme(resolved, machine.gpus)
    need = planner.need_of(scheme, recompute=recompute)
    largest = planner.largest_micro_batch(scheme, machine.usable, recompute=recompute)
    share = scheme.micro_batch * scheme.accumulation
    micro = _micro_batch(planner, scheme, min(share, largest), machine.usable, recompute)
    on_host = machine.gpus_per_host * max(need.host, need.build)
    size = checkpoint_bytes(planner.sizes, scheme, planner.keeps_ema)
    if planner.copies_saves:
        on_host += snapshot_bytes(planner.sizes, scheme, planner.keeps_ema, machine.gpus_per_host)
    return Option(
        stage=scheme.stage,
        offload=offload,
        recompute=recompute,
        need=need,
        largest_micro_batch=largest,
        host_bytes=on_host,
        fits_host=machine.host_bytes is None or on_host <= USABLE_ON_HOST * machine.host_bytes,
        micro_batch=micro,
        accumulation=share // micro if micro else 0,
        checkpoint_bytes=size,
        save_seconds=size / machine.disk_rate,
    )


def _micro_batch(
    planner: MemoryPlanner, scheme: ZeroScheme, most: int, usable: float, recompute: bool
) -> int:
    """The largest micro-batch that divides a rank's share of the batch and fits; 0 if none does.

    More micro-batches in an update keep more gradients between them, so each is looked at anew.
    """
    share, step = scheme.micro_batch * scheme.accumulation, planner.step_of_micro_batch
    for images in range(most - most % step, 0, -step):
        if share % images == 0:
            divided = replace(scheme, micro_batch=images, accumulation=share // images)
            if planner.need_of(divided, recompute=recompute).device <= usable:
                return images
    return 0


def _cost(option: Option) -> tuple[float, int]:
    cost = _STAGE_COST[option.stage] * _OFFLOAD_COST[option.offload]
    cost *= _RECOMPUTE_COST if option.recompute else 1.0
    return cost * (1 + _IDLE_IMAGES / option.micro_batch), option.stage
