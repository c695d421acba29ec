"""Maps a model, module or optimizer to its engine, and keeps a record of each engine."""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from yacs.config import CfgNode

from internvl_ds.config.ds.diagnostics import refuse
from internvl_ds.config.ds.resolve import precision_of
from internvl_ds.config.ds.unsupported import unsupported_settings
from internvl_ds.config.tree import default_of, get_option, value_at
from internvl_ds.dist.process_group import limit_collectives
from internvl_ds.dist.rendezvous import world_size
from internvl_ds.engine.accumulation import Accumulation, watch_zero_grad
from internvl_ds.engine.elementwise import require_steps
from internvl_ds.engine.lr_schedule import LrSchedule, require_unit
from internvl_ds.engine.optimizer_trial import effect_of_zeros
from internvl_ds.engine.param_groups import MergedGroups
from internvl_ds.errors import ConfigError, EngineNotFound
from internvl_ds.zero.guards import guard
from internvl_ds.zero.module_state import require_bare, require_plain_state, require_statistics
from internvl_ds.zero.wrap import wrap
from internvl_ds.zero.wrapper import Wrapper

logger = logging.getLogger(__name__)

_LIMIT_KEY = 'TRAIN.MAX_CONSECUTIVE_OVERFLOWS'


@dataclass(eq=False)
class Registration:
    """The record of an engine.

    Attributes:
        wrapper: all that depends on the kind of its optimizer.
        overflow_limit: TRAIN.MAX_CONSECUTIVE_OVERFLOWS of its configuration; 0 for no limit.
        config: what it was initialized with; None for an engine of plain DeepSpeed.
        schedule: the lr schedule that it steps; None without one.
        merged: the parameter groups that `initialize` merged; None where it did not.
        accumulation: the micro-batches since its last update.
    """

    wrapper: Wrapper
    overflow_limit: int
    config: CfgNode | None = None
    schedule: LrSchedule | None = None
    merged: MergedGroups | None = None
    accumulation: Accumulation = field(default_factory=Accumulation)

    @property
    def scheduler(self) -> Any:
        """The scheduler that the engine steps; None without one."""
        return self.schedule.scheduler if self.schedule else None

    @property
    def progress(self) -> tuple[int, int]:
        """The applied updates, and the micro-batches of this process."""
        return applied_updates(self.wrapper.engine), self.accumulation.micro_batches

    @property
    def client_groups(self) -> MergedGroups:
        """The parameter groups as the client built them, before `initialize` merged equal ones.

        For an engine of plain ``deepspeed.initialize``: its present groups.
        """
        if self.merged:
            return self.merged
        names = [[self.wrapper.names[p] for p in group] for group in self.wrapper.groups()]
        return MergedGroups(names, list(range(len(names))), names)


# Engine, module and optimizer objects -> their engine. Weak on both sides: nothing is kept alive.
_engines: weakref.WeakKeyDictionary[Any, weakref.ref[DeepSpeedEngine]] = weakref.WeakKeyDictionary()
_registrations: weakref.WeakKeyDictionary[DeepSpeedEngine, Registration] = (
    weakref.WeakKeyDictionary()
)


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
        require_statistics(engine.module)
        require_plain_state(engine.module)
        wrapper = wrap(engine)
        _refuse_unsupported(wrapper.ds_config)
        if wrapper.client is not None:
            require_steps(wrapper.client, wrapper.stage, world_size(), engine.device)
            _call_hooks(wrapper.client)
        wrapper.attach()
        limit_collectives()  # of the groups that DeepSpeed has just made
        _registrations[engine] = Registration(wrapper, default_of(_LIMIT_KEY))
        if wrapper.client is not None:
            watch_zero_grad(wrapper, _registrations[engine].accumulation)
        guard(wrapper, effect_of_zeros)
    for part in (engine, engine.module, engine.optimizer, wrapper_of(engine).client):
        if part is not None:
            _engines[part] = weakref.ref(engine)
    if lr_scheduler is not None:
        schedule = LrSchedule.of(lr_scheduler, schedule_in, engine.gradient_accumulation_steps())
        schedule.restore(None, *_registrations[engine].progress, loaded=False)
        _registrations[engine].schedule = schedule
    return engine


def configure(engine: DeepSpeedEngine, config: CfgNode, merged: MergedGroups | None) -> None:
    """Adds the facts that `initialize` knows to an engine's record.

    Args:
        config: TRAIN.MAX_CONSECUTIVE_OVERFLOWS is read.
        merged: the parameter groups of the client's own optimizer.
    """
    registration = _registrations[engine]
    registration.config, registration.merged = config, merged
    registration.overflow_limit = get_option(config, _LIMIT_KEY, registration.overflow_limit)
    wrapper = registration.wrapper
    mode = precision_of(wrapper.ds_config)
    scale = f', loss scale {wrapper.scale.scale:g}' if wrapper.scale else ''
    logger.info('trains in %s at ZeRO stage %d%s', mode, wrapper.stage, scale)
    if get_option(config, 'TRAIN.OPTIMIZER.USE_ZERO') and wrapper.client is not None:
        logger.info(
            'TRAIN.OPTIMIZER.USE_ZERO: %s',
            'DeepSpeed shards the state of the optimizer'
            if wrapper.partitioned
            else 'not used: the ds_config states /zero_optimization/stage 0',
        )


def registration_of(engine: DeepSpeedEngine) -> Registration:
    """The record of a registered engine."""
    return _registrations[engine]


def wrapper_of(engine: DeepSpeedEngine) -> Wrapper:
    """The `Wrapper` of a registered engine."""
    return _registrations[engine].wrapper


def wrapper_of_parameter(parameter: torch.Tensor) -> Wrapper | None:
    """The wrapper of the known engine that trains a parameter; None where there is none."""
    wrappers = (r.wrapper for r in _registrations.values())
    return next((w for w in wrappers if parameter in w.names), None)


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
        reference = _engines.get(part)
    except TypeError:  # not hashable, or no weak reference to it is possible
        return None
    return reference() if reference is not None else None


def last_config() -> CfgNode | None:
    """The config of the newest living engine; None if there is none."""
    configs = [r.config for r in _registrations.values() if r.config is not None]
    return configs[-1] if configs else None


def applied_updates(engine: DeepSpeedEngine) -> int:
    """How many updates have changed the weights, over all runs of a resumed training."""
    return int(engine.global_steps - engine.skipped_steps)


def require_fp16(ds_config: Mapping[str, Any]) -> None:
    """Raises ConfigError for an fp16 engine where this machine's device has none."""
    if value_at(ds_config, 'fp16', 'enabled') and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f'/fp16 (AMP_OPT_LEVEL O2 with AMP_TYPE float16): the {get_accelerator().device_name()}'
            ' device has no fp16 engine. AMP_OPT_LEVEL O1, torch autocast in float16, works there, '
            'and so does AMP_TYPE bfloat16.'
        )


def _call_hooks(client: torch.optim.Optimizer) -> None:
    """Makes an optimizer's step call its hooks where it has not called torch's ``__init__``.

    So does timm's Lookahead.
    """
    if getattr(client.step, 'hooked', False):
        return
    # A torch scheduler has put a step there.
    step: Callable[..., Any] | None = vars(client).get('step')

    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).step(self, *args, **kwargs) if step is None else step(*args, **kwargs)

    calls = torch.optim.Optimizer.profile_hook_step(hooked)
    calls.hooked = True  # type: ignore[attr-defined]
    client.step = types.MethodType(calls, client)  # type: ignore[method-assign]


def _refuse_unsupported(ds_config: Mapping[str, Any]) -> None:
    """Refuses unsupported settings of an engine from plain DeepSpeed, not checked before."""
    require_fp16(ds_config)
    blocks = (name for name in ('bf16', 'fp16') if value_at(ds_config, name, 'enabled'))
    version = deepspeed.__version__
    refuse(list(unsupported_settings(ds_config, next(blocks, None), version=version)))
