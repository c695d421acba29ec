"""What ranks do in test_odd_loops.py: two engines in one loop, and recomputed frozen layers."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_checkpoint,
    save_checkpoint,
)
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.errors import ConfigError
from tests.harness.model import make_config, on_device, zero_json
from tests.harness.saving import logger
from tests.harness.training import whole_weights

UPDATES, WHOLE = 4, 16


def _parts() -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    torch.manual_seed(0)
    makes = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 12))
    judges = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 1))
    return {
        'makes': (makes, torch.optim.SGD(makes.parameters(), lr=0.1, momentum=0.9)),
        'judges': (judges, torch.optim.AdamW(judges.parameters(), lr=1e-2)),
    }


def _batch(step: int, of: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(step)
    noise, real = (torch.randn(WHOLE, size, generator=numbers) for size in (6, 12))
    own = slice(of * WHOLE // world, (of + 1) * WHOLE // world)
    return noise[own], real[own]


def _judged(makes: Any, judges: Any, step: int, of: int, world: int) -> torch.Tensor:
    noise, real = _batch(step, of, world)
    scores = judges(torch.cat([real, makes(noise).detach()]))
    truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
    return binary_cross_entropy_with_logits(scores, truth)


def _made(makes: Any, judges: Any, step: int, of: int, world: int) -> torch.Tensor:
    scores = judges(makes(_batch(step, of, world)[0]))
    return binary_cross_entropy_with_logits(scores, torch.ones_like(scores))


def adversaries_alone() -> dict[str, list[float]]:
    """The weights of plain PyTorch on the whole batches."""
    (makes, of_makes), (judges, of_judges) = _parts().values()
    for step in range(UPDATES):
        for loss_of, optimizer in ((_judged, of_judges), (_made, of_makes)):
            optimizer.zero_grad()
            loss_of(makes, judges, step, 0, 1).backward()
            optimizer.step()
    pairs = {**_named('makes', makes), **_named('judges', judges)}
    return {name: p.detach().flatten().tolist() for name, p in pairs.items()}


def _named(owner: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {f'{owner}.{name}': p for name, p in module.named_parameters()}


def adversaries(stages: list[int], root: str) -> dict[str, Any]:
    """Two engines that train against each other; both are saved half way, and gone on with."""
    found = {}
    for stage in stages:
        engines = _engines(stage, root)
        for step in range(UPDATES // 2):
            _turn(engines, step)
        for name, (engine, optimizer, scaler) in engines.items():
            save_checkpoint(
                _config(f'{root}/{stage}{name}'), step, engine.module, 0.0, optimizer, None, scaler,
                logger,
            )  # fmt: skip
        engines = _engines(stage, root)
        for name, (engine, optimizer, scaler) in engines.items():
            config = _config(f'{root}/{stage}{name}', MODEL__RESUME=f'{root}/{stage}{name}')
            load_checkpoint(config, engine.module, optimizer, None, scaler, logger)
        for step in range(UPDATES // 2, UPDATES):
            _turn(engines, step)
        found[str(stage)] = {
            f'{name}.{n}': w.flatten().tolist()
            for name, (engine, *_) in engines.items()
            for n, w in whole_weights(engine).items()
        }
    return found


def _config(output: str, **values: Any) -> Any:
    return make_config(output, DATA__BATCH_SIZE=WHOLE // world_size(), **values)


def _engines(stage: int, root: str) -> dict[str, Any]:
    return {
        name: (
            *initialize(_config(f'{root}/{stage}{name}'), model, client, zero_json(stage)),
            NativeScalerWithGradNormCount(),
        )
        for name, (model, client) in _parts().items()
    }


def _turn(engines: dict[str, Any], step: int, freezes: bool = True) -> None:
    (makes, of_makes, scales_makes), (judges, of_judges, scales_judges) = engines.values()
    where = step, rank(), world_size()
    scales_judges(_judged(makes, judges, *where), of_judges)
    # The judge's own gradients are not wanted now: its bare module gives those of its inputs.
    judges.module.requires_grad_(not freezes)
    loss = _made(makes, judges.module, *where)
    judges.module.requires_grad_(True)
    scales_makes(loss, of_makes)


def not_frozen(stages: list[int], root: str) -> list[str]:
    """What is said where the maker's loss would leave gradients in the judge."""
    said = []
    for stage in stages:
        try:
            _turn(_engines(stage, root), 0, freezes=False)
        except ConfigError as error:
            said.append(str(error))
    return said


def recomputed(stages: list[int]) -> dict[str, Any]:
    """A transformer whose norms and patches are frozen, with activations kept and recomputed."""
    found = {}
    for stage in stages:
        for recomputes in (False, True):
            torch.manual_seed(0)
            model = timm.create_model(
                'vit_tiny_patch16_224', img_size=32, depth=2, embed_dim=24, num_heads=2,
                num_classes=5,
            )  # fmt: skip
            model.set_grad_checkpointing(recomputes)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_('norm' not in name and 'embed' not in name)
            client = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            engine, optimizer = initialize(_config(''), model, client, zero_json(stage))
            scaler, size = NativeScalerWithGradNormCount(), WHOLE // world_size()
            for step in range(2):
                numbers = torch.Generator().manual_seed(step)
                x = torch.randn(WHOLE, 3, 32, 32, generator=numbers)
                own = slice(rank() * size, (rank() + 1) * size)
                x, y = on_device(x[own], (torch.arange(WHOLE) % 5)[own])
                scaler(cross_entropy(engine(x), y), optimizer)
            weights = {n: w.flatten().tolist() for n, w in whole_weights(engine).items()}
            found[f'{stage} {recomputes}'] = weights
    return found
