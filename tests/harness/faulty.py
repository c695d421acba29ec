"""A model that tells where its ranks are, and fails or hangs when it is told to."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from internvl_ds.dist.rendezvous import rank, world_size
from tests.harness.training import Brightness


class Faulty(Brightness):
    """Writes ``pid_RANK`` ("host pid") into a folder.

    Where it finds ``hang`` there it writes ``hangs_RANK`` and computes for ever, and for ``crash``
    the last rank raises.
    """

    def __init__(self, classes: int, folder: Path) -> None:
        super().__init__(classes)
        self._folder = folder
        (folder / f'pid_{rank()}').write_text(f'{socket.gethostname()} {os.getpid()}')

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if (self._folder / 'hang').exists():
            (self._folder / f'hangs_{rank()}').touch()
            time.sleep(3600)
        if rank() == world_size() - 1 and (self._folder / 'crash').exists():
            raise ValueError('a bad batch')
        return super().forward(images)


def model(config: CfgNode) -> nn.Module:
    """For MODEL.FACTORY; the folder is the one of the data."""
    return Faulty(config.MODEL.NUM_CLASSES, Path(config.DATA.DATA_PATH))
