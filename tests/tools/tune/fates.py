"""Models that crash, hang or eat memory when a trial's settings say so; and tuning over them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from yacs.config import CfgNode

from internvl_ds.tools.cli import main
from internvl_ds.tools.plan import memory_planner
from tests.harness.training import Brightness

_TOO_MUCH = 2**36  # bytes: more than the test's ulimit


class Fated(Brightness):
    """Meets its fate in the first forward pass."""

    def __init__(self, classes: int, fate: str) -> None:
        super().__init__(classes)
        self._fate = fate

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._fate == 'crash':
            raise ValueError('a bad batch')
        if self._fate == 'hang':
            print('hanging', flush=True)
            time.sleep(3600)
        if self._fate == 'eat':
            torch.empty(_TOO_MUCH, dtype=torch.uint8)
        return super().forward(images)


def model(config: CfgNode) -> nn.Module:
    """For MODEL.FACTORY; MODEL.KWARGS says the fate."""
    return Fated(config.MODEL.NUM_CLASSES, config.MODEL.KWARGS.get('fate', ''))


class Need(NamedTuple):
    """Bytes of one rank."""

    device: int
    host: int


class OnlyStage0:
    """A plan by which every other ZeRO stage needs more than any machine has."""

    def __init__(self, config: CfgNode, *, gpu: bool) -> None:
        pass

    def need(self, resolved: Mapping[str, Any], ranks: int, *, recompute: bool) -> Need:
        """By the stage alone."""
        return Need(10**15 if resolved['zero_optimization']['stage'] else 1, 0)


if __name__ == '__main__':  # the command, with that plan: fewer trials to wait for
    memory_planner.MemoryPlanner = OnlyStage0
    sys.exit(main(['tune', *sys.argv[1:]]))
