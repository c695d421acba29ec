"""The averaged weights in a tag: sharded as `ShardedEma` keeps them, or whole as timm does."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from internvl_ds.checkpoint.direct_or_reshard import same_groups
from internvl_ds.checkpoint.formats.ema_files import (
    AS_IN_MODEL,
    WHOLE,
    EmaFiles,
    all_flats,
    ema_flats,
)
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.restore import load_weights
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.engine.registry import applied_updates, wrapper_of
from internvl_ds.errors import CheckpointError
from internvl_ds.files.ema_shard import EmaFile
from internvl_ds.zero.lazy_tensor import Flat


def ema_file(model_ema: Any, frozen: Mapping[str, torch.Tensor] | None = None) -> EmaFile | None:
    """What this rank writes of an average: its part of a sharded one; rank 0 the whole of timm's.

    Args:
        model_ema: the average.
        frozen: parameters of the model that stand apart from a tag: of these a whole average leaves
            out what is the same.

    Raises:
        CheckpointError: for what is no average, or holds no values.
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
            'internvl_ds.ShardedEma(engine, decay)'
        )
    if rank() != 0:
        return None
    state = {n.removeprefix('module.'): t for n, t in module.state_dict().items()}
    same = [n for n, t in (frozen or {}).items() if n in state and _same(state[n], t)]
    metadata = {AS_IN_MODEL: json.dumps(same)} if same else None
    return EmaFile(WHOLE, {n: t for n, t in state.items() if n not in set(same)}, metadata)


def _same(averaged: torch.Tensor, tensor: torch.Tensor) -> bool:
    return torch.equal(averaged, tensor.to(averaged))


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


def warn_of_rounding(model_ema: Any, logger: logging.Logger) -> None:
    """Says so where an average is kept in so low a precision that its updates round away.

    A copy of the module of a bf16 or fp16 engine is; timm's ModelEmaV3 rounds bf16 at random.
    """
    if model_ema is None or isinstance(model_ema, ShardedEma):
        return
    types = {p.dtype for p in _ema_module(model_ema).parameters()}
    low = types & {torch.bfloat16, torch.float16}
    if getattr(model_ema, 'stochastic_rounding', False):
        low -= {torch.bfloat16}
    if low:
        name = str(low.pop()).removeprefix('torch.')
        logger.warning(
            f'{type(model_ema).__name__} averages in {name}, where most of an update with '
            f'decay {model_ema.decay} is rounded away: use '
            'internvl_ds.ShardedEma(engine, decay), which averages the fp32 masters'
        )


def read_whole_ema(files: EmaFiles) -> dict[str, torch.Tensor]:
    """Name -> averaged tensor, from either kind of EMA that a tag can hold."""
    return {name: flat.whole() for name, flat in ema_flats(files).items()}


def load_whole_ema(model_ema: Any, weights: Any, where: str) -> None:
    """Copies whole averaged weights by name into any kind of average of the same model."""
    tensors = {name.removeprefix('module.'): t for name, t in weights.items()}
    if isinstance(model_ema, ShardedEma):
        flats = {name: Flat.of(f'{where}: {name}', t) for name, t in tensors.items()}
        model_ema.load_whole(flats, where)
        return
    module = _ema_module(model_ema)
    has_prefix = all(name.startswith('module.') for name in module.state_dict())
    load_weights(module, {f'module.{n}' if has_prefix else n: t for n, t in tensors.items()}, where)


def ema_fits_directly(model_ema: ShardedEma, files: EmaFiles) -> bool:
    """Whether a tag's sharded average was cut as this one is."""
    header, engine = files.header, model_ema.engine
    running = (wrapper_of(engine).stage, world_size())
    return (int(header['zero_stage']), int(header['world_size'])) == running and same_groups(
        engine, TagShards(files.tag)
    )


def count_on(model_ema: Any, updates: int | None, where: object, logger: logging.Logger) -> None:
    """Counts the updates of an average whose checkpoint does not say their number, for its warm-up.

    ``updates``: of the weights; None for as many as the engine has applied.
    """
    if isinstance(model_ema, ShardedEma):
        applied = applied_updates(model_ema.engine)
        model_ema.num_updates = applied if updates is None else updates
        (logger.warning if model_ema.warmup else logger.info)(
            f'{where} does not say how often its average was updated: counted as '
            f'{model_ema.num_updates}, as its weights were'
        )


def load_other_ema(model_ema: ShardedEma, files: EmaFiles) -> None:
    """Takes this rank's part of an average that was cut in another way."""
    model_ema.load_whole(all_flats(files), str(files.tag))
    if files.sharded:
        model_ema.take_header(files.header)
