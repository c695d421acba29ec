"""Drops configurations that by the plan need more memory than there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

from internvl_ds.config.tree import set_options
from internvl_ds.tools.plan.memory_planner import MemoryPlanner, Need

PlannerFactory = Callable[..., MemoryPlanner]


class Plans:
    """A planner for every model that settings make, each made once."""

    def __init__(self, make: PlannerFactory, gpu: bool) -> None:
        self._make, self._gpu = make, gpu
        self._planners: dict[str, MemoryPlanner] = {}

    def of(self, config: CfgNode) -> MemoryPlanner:
        """The planner of this yacs tree; batch and recomputation are asked of it, not set in it."""
        same = {
            'DATA.BATCH_SIZE': 1, 'TRAIN.ACCUMULATION_STEPS': 1, 'TRAIN.USE_CHECKPOINT': False,
        }  # fmt: skip
        key = set_options(config.clone(), same).dump()
        if key not in self._planners:
            self._planners[key] = self._make(config, gpu=self._gpu)
        return self._planners[key]


@dataclass(frozen=True)
class MemoryLimits:
    """The memory that one rank may take."""

    device: int  # bytes
    host: int  # bytes
    on_cpu: bool  # whether both are the same memory
    baseline: int = 0  # bytes that a rank has taken before it builds a model; of the host's

    @classmethod
    def of(cls, bench: Mapping[str, Any]) -> MemoryLimits:
        """The limits in a trial's bench.json."""
        on_cpu = bench['device'] == 'cpu'
        baseline = bench['baseline_bytes'] if on_cpu else 0
        return cls(bench['device_bytes'], bench['host_bytes'], on_cpu, baseline)

    def lacks(self, need: Need) -> str:
        """Why a need exceeds the limit, in one line; '' if it does not."""
        if self.on_cpu:
            total = need.device + need.host + self.baseline
            return _compare("a rank's", total, self.host)
        return _compare("the device's", need.device, self.device) or _compare(
            "a rank's host", need.host, self.host
        )


def _compare(whose: str, need: int, have: int) -> str:
    if need <= have:
        return ''
    return f'needs {need / 1e9:.1f} GB of {whose} memory, and {have / 1e9:.1f} GB are there'
