"""Optimizer, parameter groups and learning-rate schedule, from the TRAIN section."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
from timm import optim as timm_optim
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.choices import require_one_of
from internvl_ds.errors import ConfigError
from internvl_ds.zero.parameters import whole_shape

_logger = logging.getLogger(__name__)

# Parameters of deformable convolutions, whose learning rate DCN_LR_MUL scales.
_DCN_NAMES = ('offset', 'attention_weights', 'center_feature_scale_proj', 'alpha_beta')


class ScaledLrs(NamedTuple):
    """Learning rates for the global batch."""

    base: float
    warmup: float
    min: float


def scaled_lrs(config: CfgNode, world_size: int) -> ScaledLrs:
    """Scales TRAIN.{BASE_LR,WARMUP_LR,MIN_LR}, given for a batch of 512, to the global batch.

    In the original's order of operations, for the same bits.
    """
    batch, steps = config.DATA.BATCH_SIZE, accumulation_steps(config)
    lrs = config.TRAIN.BASE_LR, config.TRAIN.WARMUP_LR, config.TRAIN.MIN_LR
    return ScaledLrs(*(lr * batch * world_size / 512 * steps for lr in lrs))


def told_lrs(config: CfgNode, world_size: int, scaled: ScaledLrs) -> str:
    """A log line on `scaled_lrs`: batch, and learning rates before and after."""
    batch, steps = config.DATA.BATCH_SIZE, accumulation_steps(config)
    train, images = config.TRAIN, batch * world_size * steps
    before = ScaledLrs(train.BASE_LR, train.WARMUP_LR, train.MIN_LR)
    pairs = zip(('BASE_LR', 'WARMUP_LR', 'MIN_LR'), before, scaled, strict=True)
    scales = ', '.join(f'TRAIN.{key} {old:.4g} -> {new:.4g}' for key, old, new in pairs)
    return (
        f'learning rates are for 512 images; an update has {images} (DATA.BATCH_SIZE {batch} x '
        f'{world_size} ranks x {steps} micro-batches), so they are times {images / 512:.4g}: '
        f'{scales}'
    )


def accumulation_steps(config: CfgNode) -> int:
    """Micro-batches per update, at least 1 (the setting's 0 and 1 both mean none)."""
    return max(1, config.TRAIN.ACCUMULATION_STEPS or 0)


def updates_per_epoch(config: CfgNode, micro_batches: int) -> int:
    """Updates in an epoch of ``micro_batches``; a shorter last group is an update of its own."""
    return math.ceil(micro_batches / accumulation_steps(config))


def param_groups(model: nn.Module, config: CfgNode, base_lr: float) -> list[dict[str, Any]]:
    """A group for each trained parameter, in the model's order, as the original builds them.

    So that its checkpoints resume, and exports do there; `initialize` merges equal ones.

    One-dimensional tensors, biases, and what ``model.no_weight_decay()`` or
    ``no_weight_decay_keywords()`` name have no weight decay. TRAIN.LR_LAYER_DECAY scales the lr
    by depth and, with it only, TRAIN.OPTIMIZER.DCN_LR_MUL that of deformable convolutions' own
    parameters, as in the original.

    Returns:
        Groups of one in ``params`` and ``param_names``, with ``lr`` (base_lr times the scale) and
        ``weight_decay``. A schedule starts from this lr; its warm-up's first value and its minimum
        are the same for all groups.

    Raises:
        ConfigError: for LR_LAYER_DECAY with a model that does not say how deep its parameters are.
    """
    exempt = _no_decay_patterns(model)
    scales = _layer_scales(model, config)
    multiplier = _dcn_multiplier(config)
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # Under zero.Init a parameter is a flat shard.
        dims = len(whole_shape(parameter))
        no_decay = dims <= 1 or name.endswith('.bias') or any(fnmatch(name, p) for p in exempt)
        decay = 0.0 if no_decay else config.TRAIN.WEIGHT_DECAY
        lr = scales.get(name, 1.0) * base_lr
        if any(part in name for part in _DCN_NAMES):
            lr = multiplier * lr
        members = {'params': [parameter], 'param_names': [name]}
        groups.append({**members, 'lr': lr, 'weight_decay': decay})
    return groups


def build_optimizer(
    config: CfgNode,
    model: nn.Module,
    base_lr: float,
    adam: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> torch.optim.Optimizer:
    """Builds the optimizer that TRAIN.OPTIMIZER.NAME names over `param_groups`.

    'adamw' is ``adam``; 'sgd' (Nesterov) and 'sgd_linear_probing' (momentum 0.9) are torch's;
    any other name is timm's.

    Args:
        config: TRAIN is read.
        model: whose parameters are trained.
        base_lr: the lr at the top of the schedule.
        adam: which AdamW, as `adam_class` chose.

    Raises:
        ConfigError: for a name that timm does not have either, or that cannot be built here.
    """
    settings = config.TRAIN.OPTIMIZER
    name = settings.NAME.lower()
    groups = param_groups(model, config, base_lr)
    if name == 'adamw':
        return adam(groups, lr=base_lr, betas=tuple(settings.BETAS), eps=settings.EPS)
    if name == 'sgd':
        # Nesterov is defined for a momentum only; torch refuses it without one.
        return torch.optim.SGD(
            groups, lr=base_lr, momentum=settings.MOMENTUM, nesterov=settings.MOMENTUM > 0
        )
    if name == 'sgd_linear_probing':
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
    try:
        return timm_optim.create_optimizer_v2(groups, opt=name, **kwargs)
    except Exception as error:  # apex, bitsandbytes or opt_einsum is not there
        words = ' '.join(str(error).split()) or 'its package is not installed'
        raise ConfigError(
            f'TRAIN.OPTIMIZER.NAME {settings.NAME!r} cannot be built here '
            f'({type(error).__name__}: {words}); install what it needs, or use adamw'
        ) from error


def build_scheduler(
    config: CfgNode, optimizer: torch.optim.Optimizer, micro_batches: int, lrs: ScaledLrs
) -> Scheduler:
    """Builds the original's schedule, which counts micro-batches from 0.

    It is moved after each whole update, ``step_update(epoch * micro_batches + idx)``, so an update
    trains with the lr of the one before; ``schedule_in='original'`` of `initialize` does so.

    The first TRAIN.WARMUP_EPOCHS rise linearly from the warm-up lr. 'cosine' counts from the run's
    first micro-batch, warm-up included; 'step' from the end of the warm-up (timm's default);
    'linear' falls from there to 1 % of the lr at the run's end.

    Args:
        config: TRAIN is read.
        optimizer: its groups come from `param_groups`.
        micro_batches: those of one epoch on this rank.
        lrs: the scaled learning rates.

    Raises:
        ConfigError: for an unknown TRAIN.LR_SCHEDULER.NAME.
    """
    name = config.TRAIN.LR_SCHEDULER.NAME
    require_one_of('TRAIN.LR_SCHEDULER.NAME', name, ('cosine', 'linear', 'step'))
    total = max(1, int(config.TRAIN.EPOCHS * micro_batches))
    warmup = int(config.TRAIN.WARMUP_EPOCHS * micro_batches)
    shared = {'warmup_t': warmup, 'warmup_lr_init': lrs.warmup, 't_in_epochs': False}
    if name == 'cosine':
        return CosineLRScheduler(
            optimizer, t_initial=total, lr_min=lrs.min, warmup_prefix=False, **shared
        )
    if name == 'linear':
        return LinearSchedule(optimizer, total, warmup, lrs.warmup)
    decay_t = max(1, int(config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS * micro_batches))
    rate = config.TRAIN.LR_SCHEDULER.DECAY_RATE
    return StepLRScheduler(
        optimizer, decay_t=decay_t, decay_rate=rate, warmup_prefix=True, **shared
    )


class LinearSchedule(Scheduler):
    """A linear warm-up, then a straight line to 1 % of each group's lr. Counts updates, not epochs.

    timm has none that falls to a share of each group's own lr. The attributes, which a checkpoint
    keeps, have the names that the original's schedule gives them.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, t_initial: int, warmup_t: int, warmup_lr_init: float
    ) -> None:
        """``t_initial`` is where the line ends, ``warmup_t`` where the warm-up does."""
        super().__init__(optimizer, param_group_field='lr', t_in_epochs=False)
        self.t_initial, self.lr_min_rate = t_initial, 0.01
        self.warmup_t, self.warmup_lr_init = warmup_t, warmup_lr_init
        self.warmup_steps: list[float] = [1 for _ in self.base_values]
        if warmup_t:
            self.warmup_steps = [(lr - warmup_lr_init) / warmup_t for lr in self.base_values]
            self.update_groups(warmup_lr_init)

    def _get_lr(self, t: float) -> list[float]:
        if t < self.warmup_t:
            return [self.warmup_lr_init + t * step for step in self.warmup_steps]
        line = max(1, self.t_initial - self.warmup_t)
        share = min(1.0, (t - self.warmup_t) / line)  # a run that is timed goes on after the end
        return [lr - (lr - lr * self.lr_min_rate) * share for lr in self.base_values]


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
    # The original's models say it by keyword; InternImage's spell it the second way.
    for method in ('lr_decay_keywords', 'lr_decay_keywards'):
        by_keyword = getattr(model, method, None)
        if callable(by_keyword):
            table = by_keyword(ratio)
            return {
                name: next((scale for word, scale in table.items() if word in name), 1.0)
                for name, _ in model.named_parameters()
            }
    if not callable(getattr(model, 'group_matcher', None)):
        raise ConfigError(
            f'TRAIN.LR_LAYER_DECAY True: {type(model).__name__} has neither lr_decay_keywords('
            "decay_ratio), a method that returns {part of a parameter's name: its share of the "
            "lr}, nor timm's group_matcher(): write one of the two, or set it False"
        )
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: group['lr_scale']
        for group in timm_optim.param_groups_layer_decay(model, layer_decay=ratio)
        for parameter in group['params']
    }


def _dcn_multiplier(config: CfgNode) -> float:
    """What the lr of deformable convolutions is multiplied by; 1 without LR_LAYER_DECAY."""
    multiplier = config.TRAIN.OPTIMIZER.DCN_LR_MUL
    if multiplier is None:
        return 1.0
    if not config.TRAIN.LR_LAYER_DECAY:
        _logger.warning(
            'TRAIN.OPTIMIZER.DCN_LR_MUL %s is not used: as in the original it takes '
            'TRAIN.LR_LAYER_DECAY True (with TRAIN.LR_LAYER_DECAY_RATIO 1.0 for the same lr in '
            'all layers)',
            multiplier,
        )
        return 1.0
    return multiplier
