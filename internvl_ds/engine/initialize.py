"""initialize(): an engine from a model, an optimizer, the yacs config and a ds_config."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.lion import DeepSpeedCPULion
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.choices import frozen_of
from internvl_ds.config.counts import require_counts
from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.ds.check import examine, require_right
from internvl_ds.config.ds.load import load_ds_config
from internvl_ds.config.tree import checkpoint_option, get_option
from internvl_ds.dist.device import slow_bf16
from internvl_ds.dist.process_group import init_distributed, limit_collectives, making_groups
from internvl_ds.dist.rendezvous import exchange, rank, world_size
from internvl_ds.engine import param_groups
from internvl_ds.engine.compiling import compile_module
from internvl_ds.engine.elementwise import require_steps
from internvl_ds.engine.lr_schedule import require_unit
from internvl_ds.engine.monitors import drop_unwritable_monitors, guard_monitors
from internvl_ds.engine.registry import configure, register, require_fp16
from internvl_ds.errors import ConfigError
from internvl_ds.files import for_show, write_text
from internvl_ds.zero.guards import require_unsharded
from internvl_ds.zero.module_state import (
    keeping_buffers,
    require_bare,
    require_dtypes,
    require_plain_state,
    require_real,
    require_sendable,
)
from internvl_ds.zero.muon.deferred import import_muon
from internvl_ds.zero.origins import warn_of_unknown_origins
from internvl_ds.zero.parameters import whole_numel

logger = logging.getLogger(__name__)


def initialize(
    config: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    ds_config: str | Path | Mapping[str, Any] | ds.Resolution | None = None,
    *,
    lr_scheduler: Any = None,
    schedule_in: str | None = None,
) -> tuple[DeepSpeedEngine, Any]:
    """Makes a DeepSpeed engine from plain parts. Collective: every rank calls it.

    The optimizer's parameter groups of equal settings are merged (no tensor's lr or weight decay
    changes), and the ds_config is resolved against the yacs config (see `ds_config.resolve`).

    Args:
        config: the yacs tree; AMP_OPT_LEVEL, AMP_TYPE, DATA.BATCH_SIZE, TRAIN.ACCUMULATION_STEPS,
            TRAIN.CLIP_GRAD and OUTPUT are read.
        model: weights already loaded (`load_pretrained` comes before).
        optimizer: fresh, over ``model``'s parameters; None lets the ds_config's optimizer section
            make one.
        ds_config: a JSON path, the name of a shipped one, a mapping, or None (the yacs config
            alone, ZeRO stage 0); a `Resolution` of `examine` is not checked again.
        lr_scheduler: keyword-only. A timm scheduler or a torch one, built over ``optimizer``. It is
            never given to DeepSpeed: `NativeScalerWithGradNormCount` steps it after each applied
            update, and nobody else may.
        schedule_in: keyword-only. What ``lr_scheduler`` counts. 'updates', the default: the applied
            ones so far. 'micro-batches', for one built over ``len(loader)``: all that have come so
            far, those of skipped updates and those that zero_grad dropped included, which is
            ``epoch * len(loader) + idx + 1`` of a loop. timm's ``step_update`` gets that number,
            and torch's ``step`` is called as many times. 'original': the same less 1, after every
            whole update, a skipped one too, which are the numbers of the original's loop.

    Returns:
        The engine, and the optimizer to pass to the adapters.

    Raises:
        ConfigError: for settings that disagree or that this version cannot train right.
    """
    require_counts(config, ('SAVE_CKPT_NUM', 'CHECKPOINT'))
    warn_of_unknown_origins(frozen_of(config), model)
    for require in (require_bare, require_real, require_sendable, require_plain_state):
        require(model)
    require_unsharded(optimizer)
    require_unit(lr_scheduler, schedule_in)
    init_distributed(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    resolved = _resolve(config, trained, optimizer, ds_config, lr_scheduler is not None)
    if (stage := resolved['zero_optimization']['stage']) == 3:
        require_dtypes(model)
    merged = _merge_groups(model, optimizer, lr_scheduler, stage)
    drop_unwritable_monitors(resolved, checkpoint_option(config, 'RENDEZVOUS_TIMEOUT'))
    limit_collectives(config)
    # Ranks may have read pretrained weights until now, which has a limit of its own.
    exchange('initialize', None, checkpoint_option(config, 'IO_TIMEOUT'))
    import_muon()
    with making_groups(), keeping_buffers(model):
        engine, ds_optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, model_parameters=trained, config=resolved
        )
    guard_monitors(engine)
    register(engine, lr_scheduler=lr_scheduler, schedule_in=schedule_in)
    limit_collectives(config)
    configure(engine, config, merged)
    compile_module(engine, config)
    if optimizer is not None or 'optimizer' in resolved:
        _write_ds_config(config, resolved)
    return engine, ds_optimizer


def _resolve(
    config: CfgNode,
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    ds_config: str | Path | Mapping[str, Any] | ds.Resolution | None,
    has_scheduler: bool,
) -> dict[str, Any]:
    """The ds_config to train with; raises ConfigError if it does not fit the parts."""
    if not isinstance(ds_config, ds.Resolution):
        ds_config = examine(
            load_ds_config(ds_config),
            config,
            world_size(),
            optimizer_in_code=optimizer is not None,
            scheduler_in_code=has_scheduler,
            cpu_optimizer=isinstance(optimizer, DeepSpeedCPUAdam | DeepSpeedCPULion),
        )
    require_right(ds_config.findings)
    warning = slow_bf16(ds.precision_of(ds_config.tree), get_accelerator().device_name())
    if warning and rank() == 0:
        logger.warning(warning)
    resolved = ds.size_buckets(ds_config, sum(map(whole_numel, trained))).tree
    require_fp16(resolved)
    return resolved


def _merge_groups(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, lr_scheduler: Any, stage: int
) -> param_groups.MergedGroups | None:
    """Merges the optimizer's groups of equal settings, and makes the scheduler follow.

    Raises ConfigError where the optimizer or the scheduler does not go with them.
    """
    if optimizer is None:
        if lr_scheduler is not None:
            raise ConfigError('lr_scheduler= needs the optimizer it was built over: pass both')
        return None
    require_steps(
        optimizer, stage, world_size(), torch.device(get_accelerator().current_device_name())
    )
    count, names = len(optimizer.param_groups), {p: name for name, p in model.named_parameters()}
    merged = param_groups.merge_param_groups(optimizer, names, stage)
    origins = merged.origins
    if stage in (1, 2):
        param_groups.require_trained_groups(optimizer)
    if lr_scheduler is not None:
        param_groups.remap_scheduler(lr_scheduler, origins, count)
    elif origins != list(range(count)) and any('initial_lr' in g for g in optimizer.param_groups):
        raise ConfigError(
            f'{count} parameter groups become {len(origins)}, and a scheduler was built over '
            'them already: pass it as lr_scheduler=, or build it after initialize'
        )
    logger.info('parameter groups: %d merged into %d', count, len(origins))
    return merged


def _write_ds_config(config: CfgNode, resolved: Mapping[str, Any]) -> None:
    output = get_option(config, 'OUTPUT', '')
    if output and rank() == 0:
        path = Path(output) / 'ds_config.json'
        with for_show(path, logger):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(resolved, indent=2) + '\n')
