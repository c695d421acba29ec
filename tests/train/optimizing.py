"""What ranks do in test_optimizers.py: every optimizer at every stage, and the kinds of AdamW."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import deepspeed
import timm.optim
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import nn

from internvl_ds import NativeScalerWithGradNormCount, initialize
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.errors import ConfigError
from internvl_ds.zero.fast_adam import adam_class
from tests.checkpoint.optimizers import Run
from tests.harness.elastic import ADAM, full_state
from tests.harness.model import OLD_DEEPSPEED, make_config

Make = Callable[[list[dict[str, Any]]], Any]

_BATCH, _LR = 8, 0.01
ADAMS: dict[str, Any] = {
    'torch': torch.optim.AdamW, 'cpu': DeepSpeedCPUAdam, 'fused': FusedAdam,
}  # fmt: skip
# These are also tried with offload, where all groups have their gradients at once.
_OFFLOADED = ('cpu', 'timm adamw', 'timm lookahead_adamw', 'timm adan')
# After its sixth update Lookahead does something else.
_LOOKAHEADS, _LATE, _UPDATES = ('lookahead_adamw', 'lookahead_sgd', 'lookahead_adan'), 8, 4


class Small(nn.Module):
    """Parameters of four, two and one dimensions, whose sizes divide by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.LayerNorm(12), nn.Linear(12, 5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x).flatten(1))) * self.scale


def _model() -> Small:
    torch.manual_seed(0)
    return Small()


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """With weight decay, and without."""
    groups: list[dict[str, Any]] = [
        {'params': [], 'weight_decay': 0.05}, {'params': [], 'weight_decay': 0.0},
    ]  # fmt: skip
    for parameter in model.parameters():
        groups[parameter.dim() <= 1]['params'].append(parameter)
    return groups


def _loss(module: nn.Module, update: int, of_rank: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(update)
    x = torch.randn(_BATCH, 1, 4, 4, generator=generator)
    y = torch.randint(5, (_BATCH,), generator=generator)
    size = _BATCH // world_size()
    share = slice(rank() * size, (rank() + 1) * size) if of_rank else slice(None)
    return nn.functional.cross_entropy(module(x[share]), y[share])


def _weights(model: nn.Module) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters(
        list(model.parameters()), enabled=hasattr(next(model.parameters()), 'ds_id')
    ):
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def _plain(make: Make, updates: int) -> torch.Tensor | None:
    """The weights that plain PyTorch trains on the whole batch; None where it cannot."""
    model = _model()
    optimizer = make(_groups(model))
    for update in range(updates):
        _loss(model, update, of_rank=False).backward()
        try:
            optimizer.step()
        except (RuntimeError, TypeError):
            return None
        optimizer.zero_grad()
    return _weights(model)


def _fate(
    make: Make, stage: int, updates: int, reference: torch.Tensor | None, **zero: Any
) -> str | float:
    """The relative distance of an engine's weights, or the words of the refusal."""
    model = _model()
    # Several parts a group, which DeepSpeed steps one by one.
    zero = {'stage': stage, **zero}
    if stage == 3:
        zero |= {'stage3_param_persistence_threshold': 0, 'sub_group_size': 30}
    try:
        engine, optimizer = initialize(
            make_config(DATA__BATCH_SIZE=_BATCH // world_size()), model, make(_groups(model)),
            {'zero_optimization': zero, 'zero_force_ds_cpu_optimizer': False},
        )  # fmt: skip
    except ConfigError as error:
        return str(error)
    scaler = NativeScalerWithGradNormCount()
    torch.manual_seed(rank())  # as the training program does
    for update in range(updates):
        scaler(_loss(engine, update, of_rank=True), optimizer)
    weights = _weights(model)
    engine.destroy()
    return float('inf' if reference is None else (weights - reference).norm() / reference.norm())


def optimizers() -> dict[str, Make]:
    """Name -> how it is made, of all that timm and torch have and of DeepSpeed's Adams."""
    makes: dict[str, Make] = {}
    for name in (*timm.optim.list_optimizers(), *_LOOKAHEADS):
        makes[f'timm {name}'] = lambda groups, name=name: timm.optim.create_optimizer_v2(
            groups, opt=name, lr=_LR, momentum=0.9
        )
    for name, kind in vars(torch.optim).items():
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer):
            makes[f'torch {name}'] = lambda groups, kind=kind: kind(groups, lr=_LR)
    for name in ('cpu', 'fused'):
        makes[name] = lambda groups, name=name: ADAMS[name](groups, lr=_LR)
    del makes['torch Optimizer']
    makes['torch LBFGS'] = lambda groups: torch.optim.LBFGS(  # one group
        [p for group in groups for p in group['params']], lr=_LR
    )
    return makes


def fates(only: list[str] | None = None) -> dict[str, list[str | float]]:
    """Name -> its fate at each stage; nothing where it cannot be constructed here."""
    found: dict[str, list[str | float]] = {}
    for name, make in optimizers().items():
        if only and name not in only:
            continue
        try:
            make(_groups(_model()))
        except Exception:  # its package is not there, or it takes matrices only
            found[name] = []
            continue
        updates = _LATE if 'lookahead' in name else _UPDATES
        reference = _plain(make, updates)
        found[name] = [_fate(make, stage, updates, reference) for stage in range(4)]
        if name in _OFFLOADED and not OLD_DEEPSPEED:
            to = {'offload_optimizer': {'device': 'cpu'}}
            found[name] += [_fate(make, stage, updates, reference, **to) for stage in (1, 2, 3)]
    return found


def go_on(root: str) -> list[dict[str, Any]]:
    """A training that goes on, from tag to tag, with other implementations at other stages."""
    told: list[dict[str, Any]] = []
    path, saved = '', None
    for index, (name, stage) in enumerate(
        (('torch', 1), ('cpu', 2), ('fused', 3), ('cpu', 0), ('fused', 1), ('torch', 0))
    ):
        run = Run(lambda groups, name=name: ADAMS[name](groups, lr=0.01), stage, f'{root}/{index}')
        if path:
            said = run.load(path)
            assert said == '', said
        taken = full_state(run.engine, ADAM) if path else None
        run.steps(2)
        now = full_state(run.engine, ADAM)
        # zero_grad of each, FusedAdam's among them, is called as a script calls it.
        run.optimizer.zero_grad()
        path = run.save(2)
        told.append({'taken': taken == saved, 'steps': {v[-1] for v in now.values()}.pop()})
        saved = now
        run.close()
    return told


def choices(root: str) -> dict[str, Any]:
    """What `adam_class` gives on ranks of which one has no compiler."""
    from internvl_ds.zero import fast_adam

    offload = {'zero_optimization': {'stage': 2, 'offload_optimizer': {'device': 'cpu'}}}
    free = {**offload, 'zero_force_ds_cpu_optimizer': False}
    config = make_config(root)
    told: dict[str, Any] = {'built': adam_class(config, free).__name__}
    real = fast_adam._fault_of
    fast_adam._fault_of = lambda *_: 'no compiler' if rank() == 1 else real(*_)
    told['not built'] = adam_class(config, free).__name__
    try:
        adam_class(config, offload)
    except ConfigError as error:
        told['forced'] = str(error)
    return told
