"""What is saved and loaded: a bf16 engine of a chosen size, and the ways to swap its writer."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import nn
from yacs.config import CfgNode

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_checkpoint,
    save_checkpoint,
)
from internvl_ds.checkpoint.checkpoint_engine import ShardWriter
from internvl_ds.dist.rendezvous import rank
from tests.harness.model import make_config, make_optimizer, on_device, precision_values

logger = logging.getLogger('bench')

BLOCKS = 14  # makes 174 tensors
_HEADS = 8
_FEATURES, _CLASSES = 64, 10
_BATCH, _TOKENS = 2, 16


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, _HEADS, -1)).movedim(-3, 0)
        mixed = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Stack(nn.Module):
    """A plain transformer over tokens that are given as features."""

    def __init__(self, millions: float) -> None:
        """Makes about that many million parameters, all in the blocks' matrices."""
        super().__init__()
        width = _HEADS * round(math.sqrt(millions * 1e6 / (12 * BLOCKS)) / _HEADS)
        self.stem = nn.Linear(_FEATURES, width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))).mean(1))


class Subject:
    """An engine, its training step, and the checkpoint engines that it can save and load through.

    Attributes:
        engine: DeepSpeed's.
        plain: DeepSpeed's own checkpoint engine, as it came.
        ours, ours_async: one of this package for each mode, so that either keeps its buffers.
        parameters, tensors: how many the model has.
    """

    def __init__(self, millions: float, stage: int) -> None:
        torch.manual_seed(0)
        model = Stack(millions)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.tensors = len(list(model.parameters()))
        self.config = make_config(
            DATA__BATCH_SIZE=_BATCH, SAVE_CKPT_NUM=1, CHECKPOINT__RENDEZVOUS_TIMEOUT=120,
            **precision_values('bf16'),
        )  # fmt: skip
        self.engine, self.optimizer = initialize(
            self.config, model, make_optimizer(model, 1e-4), {'zero_optimization': {'stage': stage}}
        )
        self.plain: CheckpointEngine = self.engine.checkpoint_engine
        self.ours, self.ours_async = ShardWriter(), ShardWriter()
        self._scaler = NativeScalerWithGradNormCount()
        generator = torch.Generator().manual_seed(rank())
        x = torch.randn(_BATCH, _TOKENS, _FEATURES, generator=generator).bfloat16()
        y = torch.randint(_CLASSES, (_BATCH,), generator=generator)
        self._x, self._y = on_device(x, y)

    def step(self) -> float:
        """One update; returns its seconds on this rank."""
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(self.engine(self._x).float(), self._y)
        self._scaler(loss, self.optimizer, 5.0, update_grad=True)
        return time.perf_counter() - start

    def save(self, output: Path, *, in_background: bool = False) -> Path:
        """`save_checkpoint` of this package."""
        self.engine.checkpoint_engine = self.ours_async if in_background else self.ours
        config = self._config(
            OUTPUT=str(output), CHECKPOINT__ASYNC=in_background, CHECKPOINT__ASYNC_COPY='overlap'
        )
        return Path(
            save_checkpoint(config, 0, self.engine.module, 0.0, self.optimizer, None, None, logger)
        )

    def save_plain(self, output: Path, tag: str, client_state: Any = None) -> None:
        """``engine.save_checkpoint`` as DeepSpeed comes, nothing flushed."""
        self.engine.checkpoint_engine = self.plain
        self.engine.save_checkpoint(str(output), tag=tag, client_state=client_state or {})

    def load(self, path: Path) -> None:
        """`load_checkpoint` of this package."""
        self.engine.checkpoint_engine = self.ours
        config = self._config(MODEL__RESUME=str(path))
        load_checkpoint(config, self.engine.module, self.optimizer, None, None, logger)

    def load_plain(self, path: Path) -> None:
        """``engine.load_checkpoint`` as DeepSpeed comes."""
        self.engine.checkpoint_engine = self.plain
        loaded, _ = self.engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise FileNotFoundError(f'{path}: DeepSpeed found nothing to load')

    def load_universal(self, path: Path) -> None:
        """``engine.load_checkpoint`` of what DeepSpeed's ds_to_universal wrote."""
        self.engine._config.load_universal_checkpoint = True
        try:
            self.load_plain(path)
        finally:
            self.engine._config.load_universal_checkpoint = False

    def shard(self, scratch: Path) -> list[torch.Tensor]:
        """The tensors that this rank saves, in order. Every rank must call it."""
        catcher = _Catcher()
        self.engine.checkpoint_engine = catcher
        self.engine.save_checkpoint(str(scratch), tag='none', save_latest=False)
        if rank() == 0:
            shutil.rmtree(scratch)
        return catcher.tensors

    def _config(self, **values: Any) -> CfgNode:
        config = self.config.clone()
        config.defrost()
        for key, value in values.items():
            section, _, name = key.rpartition('__')
            (config[section] if section else config)[name] = value
        config.freeze()
        return config


class _Catcher(CheckpointEngine):
    """Writes nothing and keeps the tensors that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def create(self, info: Any) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        self._collect(state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError

    def commit(self, info: Any) -> bool:
        return True

    def _collect(self, tree: Any) -> None:
        if isinstance(tree, torch.Tensor):
            self.tensors.append(tree.detach())
        elif isinstance(tree, Mapping):
            for value in tree.values():
                self._collect(value)
        elif isinstance(tree, list | tuple):
            for value in tree:
                self._collect(value)
