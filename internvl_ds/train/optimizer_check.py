"""Checks what is trained with: its settings, and the optimizer at its ZeRO stage. No ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.ds.check import examine
from internvl_ds.config.ds.diagnostics import Diagnostic, diagnostic, errors_of
from internvl_ds.config.ds.resolve import Resolution
from internvl_ds.config.tree import set_options, value_at
from internvl_ds.engine.elementwise import fault_of
from internvl_ds.errors import ConfigError
from internvl_ds.train.objective.checks import contradictions
from internvl_ds.train.optim import build_optimizer
from internvl_ds.zero.fast_adam import may_be_cpu_adam

_NAME = 'TRAIN.OPTIMIZER.NAME'
# What needs the model itself.
_PLAIN = {'TRAIN.LR_LAYER_DECAY': False, 'TRAIN.OPTIMIZER.DCN_LR_MUL': None}


def examine_training(
    tree: Mapping[str, Any], config: CfgNode, ranks: int, *, in_code: bool = True
) -> Resolution:
    """As `examine`, for a run of the training program; the optimizer is tried as well.

    Args:
        tree: the ds_config, as `load_ds_config` returned it.
        config: the yacs tree.
        ranks: how many there are.
        in_code: keyword-only; whether TRAIN.OPTIMIZER is trained with, and not what the ds_config
            names.
    """
    resolution = examine(
        tree, config, ranks, optimizer_in_code=in_code, scheduler_in_code=in_code,
        cpu_optimizer=may_be_cpu_adam(config),
    )  # fmt: skip
    found = [*resolution.findings, *contradictions(config)]
    if errors_of(found):
        return resolution._replace(findings=found)
    found += _of_optimizer(config, resolution.tree, ranks, in_code)
    return resolution._replace(findings=found)


def _of_optimizer(
    config: CfgNode, tree: Mapping[str, Any], ranks: int, in_code: bool
) -> list[Diagnostic]:
    model = nn.Linear(2, 2)
    section, stage = tree.get('optimizer'), value_at(tree, 'zero_optimization', 'stage', default=0)
    pointer, yacs, name = '', _NAME, config.TRAIN.OPTIMIZER.NAME
    try:
        if in_code:
            plain = set_options(config.clone(), _PLAIN)
            optimizer = build_optimizer(plain, model, 1e-3)
        elif section and section['type'].lower() not in DEEPSPEED_OPTIMIZERS:
            pointer, yacs, name = '/optimizer/type', '', section['type']
            optimizer = getattr(torch.optim, name)(model.parameters(), **section.get('params', {}))
        else:
            return []
    except ConfigError as error:
        return [diagnostic(pointer, str(error), yacs=yacs)]
    except (TypeError, ValueError) as error:
        return [diagnostic(pointer, f'{name} cannot be made of its settings: {error}', yacs=yacs)]
    fault = fault_of(optimizer, stage, ranks, torch.device('cpu'))
    if not fault:
        return []
    kind = type(optimizer).__name__
    what = f'{yacs or pointer} {name!r} ({kind}) at ZeRO stage {stage}'
    return [diagnostic(pointer, f'{what}: {fault}', yacs=yacs)]
