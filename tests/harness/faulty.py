"""A model that tells where its ranks are, and fails or hangs when it is told to."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from internvl_ds import files
from internvl_ds.dist.rendezvous import rank, world_size
from tests.harness.training import Brightness

_AHEAD = 10  # calls: more than one rank can be ahead of another


class Faulty(Brightness):
    """Writes ``pid_RANK`` ("host pid") into a folder.

    Where it finds ``hang`` there it writes ``hangs_RANK`` and computes for ever, all ranks at the
    same call: one that hung before another would keep it in a collective. For ``crash`` the last
    rank raises.
    """

    def __init__(self, classes: int, folder: Path) -> None:
        super().__init__(classes)
        self._folder, self._calls = folder, 0
        (folder / f'pid_{rank()}').write_text(f'{socket.gethostname()} {os.getpid()}')

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        if rank() == 0 and (self._folder / 'hang').exists():
            files.write_text(self._folder / 'hang_at', str(self._calls + _AHEAD))
            (self._folder / 'hang').unlink()
        at = self._folder / 'hang_at'
        if at.exists() and self._calls >= int(at.read_text()):
            (self._folder / f'hangs_{rank()}').touch()
            time.sleep(3600)
        if rank() == world_size() - 1 and (self._folder / 'crash').exists():
            raise ValueError('a bad batch')
        return super().forward(images)


def model(config: CfgNode) -> nn.Module:
    """For MODEL.FACTORY; the folder is the one of the data."""
    return Faulty(config.MODEL.NUM_CLASSES, Path(config.DATA.DATA_PATH))
