"""initialize(), and which engine a model, a module or an optimizer belongs to."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn
from yacs.config import CfgNode

from internvl_ds import ds_config as ds
from internvl_ds.comm import init_distributed, rank, world_size
from internvl_ds.config import get_option
from internvl_ds.errors import ConfigError, EngineNotFound
from internvl_ds.files import write_text
from internvl_ds.param_groups import MergedGroups, merge_param_groups, remap_scheduler

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Registration:
    """What this package knows of an engine beside what the engine knows itself."""

    lr_scheduler: Any = None
    merged: MergedGroups | None = None


# Engine, module and optimizer objects -> their engine. Weak on both sides: nothing is kept alive.
_engines: weakref.WeakKeyDictionary[Any, weakref.ref[DeepSpeedEngine]] = weakref.WeakKeyDictionary()
_registrations: weakref.WeakKeyDictionary[DeepSpeedEngine, _Registration] = (
    weakref.WeakKeyDictionary()
)


def initialize(
    config: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    ds_config: str | Path | Mapping[str, Any] | None = None,
    *,
    lr_scheduler: Any = None,
) -> tuple[DeepSpeedEngine, Any]:
    """Makes a DeepSpeed engine from plain parts. Every rank must call it.

    The optimizer's parameter groups of equal settings are merged (no tensor's lr or weight decay
    changes), and the ds_config is resolved against the yacs config (see `ds_config.resolve`).

    Args:
        config: the yacs tree; AMP_OPT_LEVEL, AMP_TYPE, DATA.BATCH_SIZE, TRAIN.ACCUMULATION_STEPS,
            TRAIN.CLIP_GRAD and OUTPUT are read.
        model: weights already loaded (`load_pretrained` comes before).
        optimizer: fresh, over ``model``'s parameters; None lets the ds_config's optimizer section
            make one.
        ds_config: a JSON path, the name of a shipped one, a mapping, or None (the yacs config
            alone, ZeRO stage 0).
        lr_scheduler: keyword-only. A timm scheduler (counting updates) or a torch one, built over
            ``optimizer``. It is never given to DeepSpeed: `NativeScalerWithGradNormCount` steps it
            after each applied update.

    Returns:
        The engine, and the optimizer to pass to the adapters.

    Raises:
        ConfigError: for settings that disagree or that this version cannot train right.
    """
    init_distributed()
    resolved = ds.resolve(ds.load_ds_config(ds_config), config, world_size())
    _refuse_unsupported(resolved)
    _refuse_epoch_scheduler(lr_scheduler)
    if optimizer is not None and 'optimizer' in resolved:
        raise ConfigError(
            'the ds_config has an /optimizer section and an optimizer was passed as well: '
            'DeepSpeed would ignore the section; remove it, or pass optimizer=None'
        )
    if optimizer is None and lr_scheduler is not None:
        raise ConfigError('lr_scheduler= needs the optimizer it was built over: pass both')
    if optimizer is not None:
        before = len(optimizer.param_groups)
        names = {p: name for name, p in model.named_parameters()}
        merged = merge_param_groups(optimizer, names)
        origins = merged.origins
        if lr_scheduler is not None:
            remap_scheduler(lr_scheduler, origins, before)
        elif origins != list(range(before)) and _has_scheduler(optimizer):
            raise ConfigError(
                f'{before} parameter groups become {len(origins)}, and a scheduler was built over '
                'them already: pass it as lr_scheduler=, or build it after initialize'
            )
        logger.info('parameter groups: %d merged into %d', before, len(origins))
    engine, ds_optimizer, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=resolved,
    )
    register(engine, lr_scheduler=lr_scheduler)
    if optimizer is not None:
        _registrations[engine].merged = merged
    output = get_option(config, 'OUTPUT', '')
    training = optimizer is not None or 'optimizer' in resolved
    if output and training and rank() == 0:
        Path(output).mkdir(parents=True, exist_ok=True)
        write_text(Path(output) / 'ds_config.json', json.dumps(resolved, indent=2) + '\n')
    return engine, ds_optimizer


def register(engine: DeepSpeedEngine, *, lr_scheduler: Any = None) -> DeepSpeedEngine:
    """Makes an engine of plain ``deepspeed.initialize`` known to the adapters.

    Afterwards its module and its optimizer (DeepSpeed's wrapper and the client's own) stand for
    it. Registering again replaces the scheduler when one is given. An engine that is passed to an
    adapter unregistered is registered then.

    Args:
        engine: what ``deepspeed.initialize`` returned.
        lr_scheduler: keyword-only; stepped after each applied update, as in `initialize`.

    Raises:
        ConfigError: for settings that this version cannot train right.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise EngineNotFound(f'register() takes a DeepSpeedEngine, not a {type(engine).__name__}')
    _refuse_epoch_scheduler(lr_scheduler)
    if engine not in _registrations:
        _refuse_unsupported(engine.config)
        if engine.global_steps == 0:
            _undo_dummy_step(engine.optimizer)
    for part in (engine, engine.module, engine.optimizer, getattr(engine, 'basic_optimizer', None)):
        if part is not None:
            _engines[part] = weakref.ref(engine)
    registration = _registrations.setdefault(engine, _Registration())
    if lr_scheduler is not None:
        registration.lr_scheduler = lr_scheduler
    return engine


def engine_of(part: Any) -> DeepSpeedEngine:
    """The engine that a model, a module or an optimizer belongs to.

    Raises:
        EngineNotFound: when none is known, with how to register one.
    """
    engine = find_engine(part)
    if engine is None:
        raise EngineNotFound(
            f'this {type(part).__name__} belongs to no known DeepSpeed engine. Make the engine '
            'with internvl_ds.initialize(config, model, optimizer), or call '
            'internvl_ds.register(engine) on one made by deepspeed.initialize, or pass the '
            'engine itself.'
        )
    return engine


def find_engine(part: Any) -> DeepSpeedEngine | None:
    """As `engine_of`, with None for an object that belongs to no engine."""
    if isinstance(part, DeepSpeedEngine):
        return part if part in _registrations else register(part)
    try:
        known = _engines.get(part)
    except TypeError:  # not hashable, or no weak reference to it is possible
        return None
    return known() if known is not None else None


def step_scheduler(engine: DeepSpeedEngine) -> None:
    """Moves the engine's registered scheduler to the number of updates applied so far."""
    scheduler = scheduler_of(engine)
    if scheduler is None:
        return
    if hasattr(scheduler, 'step_update'):
        scheduler.step_update(engine.global_steps - engine.skipped_steps)
    else:
        scheduler.step()


def client_groups(engine: DeepSpeedEngine) -> MergedGroups:
    """The parameter groups as the client built them, before `initialize` merged equal ones.

    For an engine of plain ``deepspeed.initialize`` they are those that it has.
    """
    registration = _registrations.get(engine)
    if registration and registration.merged:
        return registration.merged
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        # a group may be several sub-groups
        lists: list[Any] = [[] for _ in optimizer.param_groups]
        for index, parameters in enumerate(optimizer.fp16_groups):
            lists[optimizer.sub_group_to_group_id[index]] += parameters
    elif hasattr(optimizer, 'bit16_groups'):
        lists = optimizer.bit16_groups
    elif hasattr(optimizer, 'fp16_groups'):
        lists = optimizer.fp16_groups
    else:
        lists = [group['params'] for group in optimizer.param_groups]
    names = [[engine.param_names[p] for p in parameters] for parameters in lists]
    return MergedGroups(names, list(range(len(names))), list(range(len(names))))


def scheduler_of(engine: DeepSpeedEngine) -> Any:
    """The scheduler that the engine steps; None without one."""
    registration = _registrations.get(engine)
    return registration.lr_scheduler if registration else None


def _refuse_unsupported(ds_config: Mapping[str, Any]) -> None:
    """Refuses what DeepSpeed 0.19.8 steps, clips or reports in a way that is not bridged yet."""
    zero = ds_config.get('zero_optimization', {})
    stage = zero.get('stage', 0)
    bf16 = ds_config.get('bf16', {}).get('enabled')
    autocast = ds_config.get('torch_autocast', {})
    in_autocast = autocast.get('enabled') and 'bf' not in str(autocast.get('dtype', 'bfloat16'))
    if ds_config.get('fp16', {}).get('enabled') or in_autocast:
        raise ConfigError(
            f'float16 at ZeRO stage {stage} is not supported by this version: DeepSpeed 0.19.8 '
            'reports and clips by wrong norms there. Set AMP_TYPE bfloat16, or AMP_OPT_LEVEL O0 '
            'for fp32.'
        )
    if not ds_config.get('managed_gradient_accumulation', True):
        raise ConfigError(
            '/managed_gradient_accumulation is false: NativeScalerWithGradNormCount marks the '
            'boundary by its update_grad; remove the key'
        )
    dtype = ds_config.get('data_types', {}).get('grad_accum_dtype')
    if bf16 and stage == 1 and dtype not in (None, 'bf16', 'bfloat16'):
        raise ConfigError(
            f'/data_types/grad_accum_dtype {dtype} with bf16 at ZeRO stage 1 is not supported by '
            'this version; use stage 2, or remove the key'
        )
    if bf16 and stage == 0 and 'optimizer' in ds_config:
        raise ConfigError(
            'the /optimizer section with bf16 at ZeRO stage 0 is not supported by this version; '
            'pass a torch optimizer to initialize, or use stage 1'
        )


def _refuse_epoch_scheduler(lr_scheduler: Any) -> None:
    if getattr(lr_scheduler, 't_in_epochs', False):
        raise ConfigError(
            f'{type(lr_scheduler).__name__} counts epochs (t_in_epochs=True), and an engine steps '
            'it by updates: build it with t_in_epochs=False, or keep it and step it yourself'
        )


def _has_scheduler(optimizer: torch.optim.Optimizer) -> bool:
    return any('initial_lr' in group for group in optimizer.param_groups)


def _undo_dummy_step(optimizer: Any) -> None:
    """Takes back the step on zero gradients with which DeepSpeed makes stage-0 optimizer state.

    AdamW counts that step and applies its weight decay, so the first real step would differ from
    plain PyTorch's (seen in DeepSpeed 0.19.8, FP16_UnfusedOptimizer.initialize_optimizer_states).
    The masters were copied from the low-precision weights and are copied from them again.
    """
    if type(optimizer).__name__ == 'FP16_UnfusedOptimizer':
        optimizer.refresh_fp32_params()
        optimizer.optimizer.state.clear()
