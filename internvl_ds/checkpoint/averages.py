"""The averaged weights in a tag: sharded as `ShardedEma` keeps them, or whole as timm does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from internvl_ds.checkpoint.restore import load_weights
from internvl_ds.checkpoint.shards import TagShards
from internvl_ds.comm import rank
from internvl_ds.ema import EmaFile, ShardedEma, has_ema, read_ema_shards
from internvl_ds.errors import CheckpointError
from internvl_ds.pretrained.sources import open_source

_WHOLE_EMA_FILE = 'ema.safetensors'


def ema_file(model_ema: Any) -> EmaFile | None:
    """What this rank writes of an average: its part of a sharded one; rank 0 the whole of timm's.

    Raises:
        CheckpointError: for what is no average, or one that holds no values.
    """
    if model_ema is None:
        return None
    if isinstance(model_ema, ShardedEma):
        return model_ema.shard_file()
    module = _ema_module(model_ema)
    empty = [name for name, p in module.named_parameters() if p.numel() == 0]
    if empty:
        raise CheckpointError(
            f'{type(model_ema).__name__} holds no values of {empty[0]} and {len(empty) - 1} more: '
            'it was copied from parameters that ZeRO-3 had partitioned; use '
            'internvl_ds.ema.ShardedEma(engine, decay)'
        )
    if rank() != 0:
        return None
    state = module.state_dict()
    return EmaFile(_WHOLE_EMA_FILE, {n.removeprefix('module.'): t for n, t in state.items()}, None)


def _ema_module(model_ema: Any) -> nn.Module:
    """The averaged module inside timm's ModelEma (``.ema``), ModelEmaV2 or V3 (``.module``)."""
    for name in ('ema', 'module'):
        module = getattr(model_ema, name, None)
        if isinstance(module, nn.Module):
            return module
    raise CheckpointError(
        f"model_ema is a {type(model_ema).__name__}; it can be a ShardedEma or timm's ModelEma, "
        'ModelEmaV2 or ModelEmaV3'
    )


def read_whole_ema(path: Path) -> dict[str, torch.Tensor]:
    """Name -> averaged tensor, from either kind of EMA that a tag can hold."""
    if (path / _WHOLE_EMA_FILE).is_file():
        return dict(open_source(str(path / _WHOLE_EMA_FILE)))
    tag, shards = TagShards(path), read_ema_shards(path)
    flats = [
        {n.removeprefix('shard/'): t for n, t in shard.items() if n.startswith('shard/')}
        for shard in shards
    ]
    if tag.zero_stage:
        averaged = tag.merge([[flat[n] for n in sorted(flat)] for flat in flats])
    else:
        averaged = flats[0]
    buffers = {n.removeprefix('buffer/'): t for n, t in shards[0].items() if 'buffer/' in n}
    weights = {**tag.weights(), **averaged, **buffers}
    aliases = tag.head.get('shared_params') or {}
    weights.update({alias: weights[name] for alias, name in dict(aliases).items()})
    return {name: weights[name] for name in tag.shapes()}


def load_whole_ema(model_ema: Any, weights: Any, where: str) -> None:
    """Copies averaged weights by name into timm's ModelEma, V2 or V3.

    Raises:
        CheckpointMismatch: for weights of another model.
        CheckpointError: for a `ShardedEma`, which this version restores from its shards only.
    """
    if isinstance(model_ema, ShardedEma):
        raise CheckpointError(
            f'{where}: this version restores a sharded EMA from tags that hold one; this one holds '
            'a whole EMA'
        )
    module = _ema_module(model_ema)
    wrapped = all(name.startswith('module.') for name in module.state_dict())
    stripped = {name.removeprefix('module.'): t for name, t in weights.items()}
    load_weights(module, {f'module.{n}' if wrapped else n: t for n, t in stripped.items()}, where)


def holds_ema(tag: Path) -> bool:
    """Whether a tag holds an average of either kind."""
    return has_ema(tag) or (tag / _WHOLE_EMA_FILE).is_file()
