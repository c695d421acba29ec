"""Optimizer, parameter groups and learning-rate schedule, from the TRAIN section."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
from timm import optim as timm_optim
from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.tree import scale_lr
from internvl_ds.errors import ConfigError
from internvl_ds.zero.parameters import whole_shape

# Parameters of deformable convolutions, whose learning rate DCN_LR_MUL scales.
_DCN_NAMES = ('offset', 'attention_weights', 'center_feature_scale_proj', 'alpha_beta')


class ScaledLrs(NamedTuple):
    """Learning rates for the batch that is really trained with."""

    base: float
    warmup: float
    min: float


def scaled_lrs(config: CfgNode, world_size: int) -> ScaledLrs:
    """Scales TRAIN.{BASE_LR,WARMUP_LR,MIN_LR}, given for a batch of 512, to the global batch."""
    images = config.DATA.BATCH_SIZE * world_size * accumulation_steps(config)
    lrs = config.TRAIN.BASE_LR, config.TRAIN.WARMUP_LR, config.TRAIN.MIN_LR
    return ScaledLrs(*(scale_lr(lr, images) for lr in lrs))


def accumulation_steps(config: CfgNode) -> int:
    """Micro-batches per update, at least 1 (the setting's 0 and 1 both mean none)."""
    return max(1, config.TRAIN.ACCUMULATION_STEPS or 0)


def updates_per_epoch(config: CfgNode, micro_batches: int) -> int:
    """Updates in an epoch of ``micro_batches``; a shorter last group is an update of its own."""
    return math.ceil(micro_batches / accumulation_steps(config))


def param_groups(model: nn.Module, config: CfgNode, base_lr: float) -> list[dict[str, Any]]:
    """Groups the trainable parameters: one group per (lr scale, weight decay), names kept.

    One-dimensional tensors, biases, and what ``model.no_weight_decay()`` or
    ``no_weight_decay_keywords()`` name have no weight decay. TRAIN.LR_LAYER_DECAY scales the lr
    by depth, TRAIN.OPTIMIZER.DCN_LR_MUL that of deformable convolutions' own parameters.

    Returns:
        Groups with ``params``, ``param_names``, ``lr`` (base_lr times the scale), ``lr_scale``,
        ``initial_lr`` (base_lr, unscaled) and ``weight_decay``. A timm scheduler starts from
        ``initial_lr`` and multiplies by ``lr_scale``, so the scale is applied once, and to the
        warm-up and minimum as well.
    """
    exempt = _no_decay_patterns(model)
    scales = _layer_scales(model, config)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Under zero.Init a parameter is a flat shard.
        dims = len(whole_shape(parameter))
        no_decay = dims <= 1 or name.endswith('.bias') or any(fnmatch(name, p) for p in exempt)
        decay = 0.0 if no_decay else config.TRAIN.WEIGHT_DECAY
        scale = scales.get(name, 1.0)
        if config.TRAIN.OPTIMIZER.DCN_LR_MUL is not None and any(n in name for n in _DCN_NAMES):
            scale *= config.TRAIN.OPTIMIZER.DCN_LR_MUL
        settings = {'lr': base_lr * scale, 'initial_lr': base_lr, 'lr_scale': scale}
        lists: dict[str, Any] = {'params': [], 'param_names': []}
        group = groups.setdefault((scale, decay), {**lists, **settings, 'weight_decay': decay})
        group['params'].append(parameter)
        group['param_names'].append(name)
    return list(groups.values())


def build_optimizer(config: CfgNode, model: nn.Module, base_lr: float) -> torch.optim.Optimizer:
    """Builds the optimizer that TRAIN.OPTIMIZER.NAME names over `param_groups`.

    'adamw', 'sgd' (Nesterov) and 'sgd_linear_probing' (momentum 0.9, no weight decay) are torch's;
    any other name is timm's. ``base_lr`` is the lr at the top of the schedule.

    Raises:
        ConfigError: for a name that timm does not have either.
    """
    settings = config.TRAIN.OPTIMIZER
    name = settings.NAME.lower()
    groups = param_groups(model, config, base_lr)
    if name == 'adamw':
        return torch.optim.AdamW(groups, lr=base_lr, betas=tuple(settings.BETAS), eps=settings.EPS)
    if name == 'sgd':
        # Nesterov is defined for a momentum only; torch refuses it without one.
        return torch.optim.SGD(
            groups, lr=base_lr, momentum=settings.MOMENTUM, nesterov=settings.MOMENTUM > 0
        )
    if name == 'sgd_linear_probing':
        for group in groups:
            group['weight_decay'] = 0.0
        return torch.optim.SGD(groups, lr=base_lr, momentum=0.9)
    if name not in timm_optim.list_optimizers():
        raise ConfigError(
            f'TRAIN.OPTIMIZER.NAME {settings.NAME!r}: neither adamw, sgd, sgd_linear_probing nor '
            f"one of timm's: {', '.join(timm_optim.list_optimizers())}"
        )
    info = timm_optim.get_optimizer_info(name)
    kwargs: dict[str, Any] = {}
    if info.has_eps:
        kwargs['eps'] = settings.EPS
    if info.has_betas and info.num_betas == len(settings.BETAS):
        kwargs['betas'] = tuple(settings.BETAS)
    kwargs |= {'lr': base_lr, 'momentum': settings.MOMENTUM}
    return timm_optim.create_optimizer_v2(groups, opt=name, **kwargs)


def build_scheduler(
    config: CfgNode, optimizer: torch.optim.Optimizer, updates: int, lrs: ScaledLrs
) -> Scheduler:
    """Builds the schedule, counted in updates: ``step_update(n)`` after the n-th one.

    The first TRAIN.WARMUP_EPOCHS rise linearly from the warm-up lr. 'cosine' and 'step' count
    from the run's first update, warm-up included; 'linear' falls from the end of the warm-up to
    1 % of the base lr at the last update.

    Args:
        config: TRAIN is read.
        optimizer: its groups come from `param_groups`.
        updates: updates in one epoch.
        lrs: the scaled learning rates.

    Raises:
        ConfigError: for an unknown TRAIN.LR_SCHEDULER.NAME.
    """
    total = max(1, int(config.TRAIN.EPOCHS * updates))
    warmup = int(config.TRAIN.WARMUP_EPOCHS * updates)
    shared = {'warmup_t': warmup, 'warmup_lr_init': lrs.warmup, 't_in_epochs': False}
    name = config.TRAIN.LR_SCHEDULER.NAME
    if name == 'cosine':
        return CosineLRScheduler(
            optimizer, t_initial=total, lr_min=lrs.min, warmup_prefix=False, **shared
        )
    if name == 'linear':
        # Every group starts from the same initial_lr, so one absolute floor is 1 % of each.
        shared |= {'t_initial': max(1, total - warmup), 'lr_min': 0.01 * lrs.base}
        return PolyLRScheduler(optimizer, power=1.0, warmup_prefix=True, **shared)
    if name == 'step':
        decay_t = max(1, int(config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS * updates))
        rate = config.TRAIN.LR_SCHEDULER.DECAY_RATE
        return StepLRScheduler(
            optimizer, decay_t=decay_t, decay_rate=rate, warmup_prefix=False, **shared
        )
    raise ConfigError(f'TRAIN.LR_SCHEDULER.NAME {name!r} is none of cosine, linear, step')


def _no_decay_patterns(model: nn.Module) -> list[str]:
    """Patterns of parameter names (shell style) that the model exempts from weight decay."""
    return [
        *_names_from(model, 'no_weight_decay'),
        *(f'*{keyword}*' for keyword in _names_from(model, 'no_weight_decay_keywords')),
    ]


def _names_from(model: nn.Module, method: str) -> Iterable[str]:
    function = getattr(model, method, None)
    return function() if callable(function) else ()


def _layer_scales(model: nn.Module, config: CfgNode) -> dict[str, float]:
    """Parameter name -> lr scale by depth; empty without TRAIN.LR_LAYER_DECAY."""
    if not config.TRAIN.LR_LAYER_DECAY:
        return {}
    ratio = config.TRAIN.LR_LAYER_DECAY_RATIO
    # The original's own models (built through MODEL.FACTORY) say it by keyword, spelled so.
    by_keyword = getattr(model, 'lr_decay_keywards', None)
    if callable(by_keyword):
        table = by_keyword(ratio)
        return {
            name: next((scale for word, scale in table.items() if word in name), 1.0)
            for name, _ in model.named_parameters()
        }
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: group['lr_scale']
        for group in timm_optim.param_groups_layer_decay(model, layer_decay=ratio)
        for parameter in group['params']
    }
