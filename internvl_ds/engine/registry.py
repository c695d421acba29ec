"""initialize(), and which engine a model, a module or an optimizer belongs to."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
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

from internvl_ds.config.counts import require_counts
from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.ds.check import examine, require_right
from internvl_ds.config.ds.diagnostics import refuse, value_at
from internvl_ds.config.ds.load import load_ds_config
from internvl_ds.config.ds.unsupported import unsupported_settings
from internvl_ds.config.tree import checkpoint_option, default_of, get_option
from internvl_ds.dist.process_group import init_distributed, limit_collectives, making_groups
from internvl_ds.dist.rendezvous import exchange, rank, world_size
from internvl_ds.engine.accumulation import Accumulation, watch_zero_grad
from internvl_ds.engine.elementwise import require_elementwise, require_own_adagrad
from internvl_ds.engine.lr_schedule import LrSchedule, require_unit
from internvl_ds.engine.monitors import drop_unwritable_monitors, guard_monitors
from internvl_ds.engine.param_groups import (
    MergedGroups,
    merge_param_groups,
    remap_scheduler,
    require_trained_groups,
)
from internvl_ds.errors import ConfigError, EngineNotFound
from internvl_ds.files import for_show, write_text
from internvl_ds.zero.guards import guard, require_bare, require_real
from internvl_ds.zero.loss_scale import LossScale
from internvl_ds.zero.loss_scale_sync import attach, pull, push
from internvl_ds.zero.module_state import remember_buffers, require_plain_state, require_sendable

logger = logging.getLogger(__name__)

_LIMIT_KEY = 'TRAIN.MAX_CONSECUTIVE_OVERFLOWS'


@dataclass(eq=False)
class _Registration:
    """What this package knows of an engine beside what the engine knows itself."""

    config: CfgNode | None = None
    schedule: LrSchedule | None = None
    merged: MergedGroups | None = None
    loss_scale: LossScale | None = None
    overflow_limit: int = 0
    accumulation: Accumulation = field(default_factory=Accumulation)


# Engine, module and optimizer objects -> their engine. Weak on both sides: nothing is kept alive.
_engines: weakref.WeakKeyDictionary[Any, weakref.ref[DeepSpeedEngine]] = weakref.WeakKeyDictionary()
_registrations: weakref.WeakKeyDictionary[DeepSpeedEngine, _Registration] = (
    weakref.WeakKeyDictionary()
)


def initialize(
    config: CfgNode,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    ds_config: str | Path | Mapping[str, Any] | ds.Resolution | None = None,
    *,
    lr_scheduler: Any = None,
    schedule_in: str | None = None,
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
            alone, ZeRO stage 0); a `Resolution` of `examine` is not checked again.
        lr_scheduler: keyword-only. A timm scheduler or a torch one, built over ``optimizer``. It is
            never given to DeepSpeed: `NativeScalerWithGradNormCount` steps it after each applied
            update, and nobody else may.
        schedule_in: keyword-only. What ``lr_scheduler`` counts. 'updates', the default: the applied
            ones so far. 'micro-batches', for one built over ``len(loader)``: all that have come so
            far, those of skipped updates and those that zero_grad dropped included, which is
            ``epoch * len(loader) + idx + 1`` of a loop. timm's ``step_update`` gets that number,
            and torch's ``step`` is called as many times.

    Returns:
        The engine, and the optimizer to pass to the adapters.

    Raises:
        ConfigError: for settings that disagree or that this version cannot train right.
    """
    require_counts(config, ('SAVE_CKPT_NUM', 'CHECKPOINT'))
    require_bare(model)
    require_real(model)
    require_sendable(model)
    require_plain_state(model)
    require_unit(lr_scheduler, schedule_in)
    init_distributed(config)
    if not isinstance(ds_config, ds.Resolution):
        ds_config = examine(
            load_ds_config(ds_config),
            config,
            world_size(),
            optimizer_in_code=optimizer is not None,
            scheduler_in_code=lr_scheduler is not None,
            cpu_optimizer=isinstance(optimizer, DeepSpeedCPUAdam | DeepSpeedCPULion),
        )
    require_right(ds_config.findings)
    trained = [p for p in model.parameters() if p.requires_grad]
    # Under zero.Init a parameter is a shard; ds_numel is what the model declared.
    elements = sum(getattr(p, 'ds_numel', p.numel()) for p in trained)
    resolved = ds.size_buckets(ds_config, elements).tree
    _refuse_fp16(resolved)
    if optimizer is None and lr_scheduler is not None:
        raise ConfigError('lr_scheduler= needs the optimizer it was built over: pass both')
    if optimizer is not None and value_at(resolved, 'zero_optimization', 'stage'):
        require_own_adagrad(optimizer)
    if optimizer is not None:
        before = len(optimizer.param_groups)
        names = {p: name for name, p in model.named_parameters()}
        merged = merge_param_groups(optimizer, names)
        origins = merged.origins
        if value_at(resolved, 'zero_optimization', 'stage') in (1, 2):
            require_trained_groups(optimizer)
        if lr_scheduler is not None:
            remap_scheduler(lr_scheduler, origins, before)
        elif origins != list(range(before)) and _has_scheduler(optimizer):
            raise ConfigError(
                f'{before} parameter groups become {len(origins)}, and a scheduler was built over '
                'them already: pass it as lr_scheduler=, or build it after initialize'
            )
        logger.info('parameter groups: %d merged into %d', before, len(origins))
    drop_unwritable_monitors(resolved, checkpoint_option(config, 'RENDEZVOUS_TIMEOUT'))
    limit_collectives(config)
    # Ranks may have read pretrained weights until now, which has a limit of its own.
    exchange('initialize', None, checkpoint_option(config, 'IO_TIMEOUT'))
    with making_groups():
        engine, ds_optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=trained,
            config=resolved,
        )
    guard_monitors(engine)
    register(engine, lr_scheduler=lr_scheduler, schedule_in=schedule_in)
    limit_collectives(config)
    registration = _registrations[engine]
    registration.config = config
    logger.info(
        'trains in %s at ZeRO stage %d%s',
        ds.precision_of(resolved),
        engine.zero_optimization_stage(),
        f', loss scale {registration.loss_scale.scale:g}' if registration.loss_scale else '',
    )
    registration.overflow_limit = get_option(config, _LIMIT_KEY, registration.overflow_limit)
    if optimizer is not None:
        registration.merged = merged
    output = get_option(config, 'OUTPUT', '')
    training = optimizer is not None or 'optimizer' in resolved
    if output and training and rank() == 0:
        path = Path(output) / 'ds_config.json'
        with for_show(path, logger):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(resolved, indent=2) + '\n')
    return engine, ds_optimizer


def register(
    engine: DeepSpeedEngine, *, lr_scheduler: Any = None, schedule_in: str | None = None
) -> DeepSpeedEngine:
    """Makes an engine of plain ``deepspeed.initialize`` known to the adapters.

    Afterwards its module and its optimizer (DeepSpeed's wrapper and the client's own) stand for
    it. Registering again replaces the scheduler when one is given. An engine that is passed to an
    adapter unregistered is registered then.

    Args:
        engine: what ``deepspeed.initialize`` returned.
        lr_scheduler, schedule_in: keyword-only; as in `initialize`.

    Raises:
        ConfigError: for settings that this version cannot train right.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise EngineNotFound(f'register() takes a DeepSpeedEngine, not a {type(engine).__name__}')
    require_unit(lr_scheduler, schedule_in)
    if engine not in _registrations:
        require_bare(engine.module)
        require_plain_state(engine.module)
        _refuse_unsupported(ds_config_of(engine))
        _refuse_fused(engine)
        if engine.zero_optimization_stage() and engine.basic_optimizer is not None:
            require_elementwise(engine.basic_optimizer, engine.device)
        if engine.global_steps == 0:
            _undo_dummy_step(engine.optimizer)
        limit = default_of(_LIMIT_KEY)
        limit_collectives()  # of the groups that DeepSpeed has just made
        registration = _Registration(loss_scale=attach(engine), overflow_limit=limit)
        _registrations[engine] = registration
        if engine.basic_optimizer is not None:
            watch_zero_grad(engine, registration.accumulation)
        guard(engine)
        remember_buffers(engine)
    for part in (engine, engine.module, engine.optimizer, getattr(engine, 'basic_optimizer', None)):
        if part is not None:
            _engines[part] = weakref.ref(engine)
    if lr_scheduler is not None:
        schedule = LrSchedule.of(lr_scheduler, schedule_in, engine.gradient_accumulation_steps())
        come = accumulation_of(engine).micro_batches
        schedule.restore(None, applied_updates(engine), come, loaded=False)
        _registrations[engine].schedule = schedule
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


def ds_config_of(engine: DeepSpeedEngine) -> dict[str, Any]:
    """The ds_config that the engine runs with, also where it was made from a file's path."""
    return engine._config._param_dict


def engine_of_parameter(parameter: torch.Tensor) -> DeepSpeedEngine | None:
    """The known engine that trains a parameter; None where there is none."""
    return next((e for e in _registrations if parameter in e.param_names), None)


def last_config() -> CfgNode | None:
    """What the last engine that lives was initialized with; None where there is none."""
    configs = [r.config for r in _registrations.values() if r.config is not None]
    return configs[-1] if configs else None


def loss_scale_of(engine: DeepSpeedEngine) -> LossScale | None:
    """The engine's loss scale; None where nothing is scaled."""
    registration = _registrations.get(engine)
    return registration.loss_scale if registration else None


def restore_loss_scale(engine: DeepSpeedEngine, state: Mapping[str, Any] | None) -> None:
    """Takes over a saved loss scale, where the engine has one.

    Args:
        state: of `LossScale` or torch's GradScaler; empty or None: what DeepSpeed's own load has
            put into its fields.
    """
    scale = loss_scale_of(engine)
    if scale is None:
        return
    if state:
        scale.load_state_dict(state)
        push(engine, scale)
    else:
        pull(engine, scale)


def overflow_limit(engine: DeepSpeedEngine) -> int:
    """TRAIN.MAX_CONSECUTIVE_OVERFLOWS of the engine's configuration; 0 for no limit."""
    return _registrations[engine].overflow_limit


def accumulation_of(engine: DeepSpeedEngine) -> Accumulation:
    """The micro-batches since the engine's last update."""
    return _registrations[engine].accumulation


def applied_updates(engine: DeepSpeedEngine) -> int:
    """How many updates have changed the weights, over all runs of a resumed training."""
    return int(engine.global_steps - engine.skipped_steps)


def schedule_of(engine: DeepSpeedEngine) -> LrSchedule | None:
    """The lr schedule that the engine steps; None without one."""
    registration = _registrations.get(engine)
    return registration.schedule if registration else None


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
    schedule = schedule_of(engine)
    return schedule.scheduler if schedule else None


def _refuse_fp16(ds_config: Mapping[str, Any]) -> None:
    """Refuses what this machine's device cannot do, whatever another one can."""
    if value_at(ds_config, 'fp16', 'enabled') and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f'/fp16 (AMP_OPT_LEVEL O2 with AMP_TYPE float16): the {get_accelerator().device_name()}'
            ' device has no fp16 engine. AMP_OPT_LEVEL O1, torch autocast in float16, works there, '
            'and so does AMP_TYPE bfloat16.'
        )


def _refuse_unsupported(ds_config: Mapping[str, Any]) -> None:
    """The same for a configuration that `require_right` has not seen: of plain DeepSpeed."""
    _refuse_fp16(ds_config)
    enabled = (name for name in ('bf16', 'fp16') if value_at(ds_config, name, 'enabled'))
    refuse(list(unsupported_settings(ds_config, next(enabled, None))))


def _refuse_fused(engine: DeepSpeedEngine) -> None:
    """A FusedAdam at stage 0 gets another wrapper, which keeps its masters in one flat tensor."""
    if type(engine.optimizer).__name__ == 'FP16_Optimizer':
        raise ConfigError(
            f'{type(engine.basic_optimizer).__name__} with fp16 or bf16 at ZeRO stage 0 is not '
            'supported by this version; pass a torch optimizer to initialize, or use stage 1'
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
