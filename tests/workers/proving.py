"""What ranks do in test_proof.py, test_tag_files.py and test_ema_layouts.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import nn

from internvl_ds import load_ema_checkpoint, save_checkpoint
from internvl_ds.checkpoint import background
from internvl_ds.checkpoint.averages import read_whole_ema
from internvl_ds.checkpoint.ema_files import EmaFiles
from internvl_ds.checkpoint.export import weights_of_tag
from internvl_ds.checkpoint.shards import TagShards
from internvl_ds.ema import ShardedEma
from internvl_ds.errors import InternvlDsError
from tests.workers.elastic import Run
from tests.workers.saving import caught_warnings

logger = logging.getLogger('test')


class Note:
    """An object that no checkpoint can keep as data."""


def whole(parameter: Any) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, 'ds_id')):
        return parameter.detach().float().clone()


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: whole(p) for name, p in run.engine.module.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names that are not in both, or not equal bit for bit."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    )


def save(run: Run, epoch: int, ema: ShardedEma | None, **more: Any) -> str:
    return save_checkpoint(
        run.config, epoch, run.engine, 50.0, run.optimizer, run.scheduler, run.scaler, logger,
        model_ema=ema, **more,
    )  # fmt: skip


def unfreeze(root: str, precision: str) -> dict[str, Any]:
    """A frozen layer is unfrozen after initialize, and a trained one frozen, before a save."""
    found = {}
    for stage in range(4):
        run = Run(stage, f'{root}/{stage}', precision=precision)
        ema = ShardedEma(run.engine, 0.5)
        run.steps(0, 2)
        ema.update()
        run.engine.module.frozen.requires_grad_(True)
        run.steps(2, 3)
        ema.update()
        run.engine.module.head.requires_grad_(False)
        want = weights(run)
        with ema.swapped_in():
            averaged = weights(run)
        with caught_warnings() as said:
            path = save(run, 0, ema)
        after = [n for n, p in run.engine.module.named_parameters() if p.requires_grad]
        report: dict[str, Any] = {'said': said, 'unfrozen stays': 'frozen.weight' in after}
        report['frozen stays'] = 'head.weight' not in after
        found[str(stage)] = report
        run.engine.destroy()
        report['exported'] = same(want, _floats(weights_of_tag(TagShards(Path(path))), want))
        report['averaged'] = same(averaged, _floats_of(read_whole_ema(EmaFiles(Path(path))), want))
        for target in range(4):
            other = Run(target, seed=9, precision=precision)
            other.load(path)
            average = ShardedEma(other.engine, 0.9)
            load_ema_checkpoint(other.config, average, logger)
            with average.swapped_in():
                got = weights(other)
            report[f'to {target}'] = same(want, weights(other)) + same(averaged, got)
            other.steps(3, 4)
            other.engine.destroy()
    return found


def _floats(flats: Any, names: Any) -> dict[str, torch.Tensor]:
    return _floats_of({name: flat.whole() for name, flat in flats.items()}, names)


def _floats_of(tensors: Any, names: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items() if name in names}


def refuse(root: str, stages: list[int], in_background: bool) -> dict[str, Any]:
    """Saves that would be of no use, each after a good one, and a good one at the end."""
    found: dict[str, Any] = {}
    for stage in stages:
        output = f'{root}/{stage}'
        run = Run(stage, output)
        run.config.defrost()
        run.config.CHECKPOINT.ASYNC = in_background
        run.steps(0, 1)
        save(run, 0, None)
        background.wait()
        module, report = run.engine.module, found.setdefault(str(stage), {})

        def attempt(
            name: str, do: Callable[[], None], undo: Callable[[], None], report: Any, run: Run
        ) -> None:
            do()
            try:
                save(run, 1, None)
                background.wait()
                report[name] = 'saved'
            except InternvlDsError as error:
                report[name] = f'{type(error).__name__}: {error}'
            undo()

        groups, head = run.engine.basic_optimizer.param_groups, module.head
        attempt(
            'object', lambda g=groups: g[0].update(note=Note()),
            lambda g=groups: g[0].pop('note'), report, run,
        )  # fmt: skip
        attempt(
            'numpy', lambda g=groups: g[0].update(note=np.float64(3)),
            lambda g=groups: g[0].pop('note'), report, run,
        )  # fmt: skip
        attempt(
            'new', lambda m=module: setattr(m, 'extra', nn.Parameter(torch.ones(3))),
            lambda m=module: delattr(m, 'extra'), report, run,
        )  # fmt: skip
        attempt(
            'replaced', lambda m=module: setattr(m, 'head', nn.Linear(13, 5)),
            lambda m=module, h=head: setattr(m, 'head', h), report, run,
        )  # fmt: skip
        report['tags'] = sorted(path.name for path in Path(output).iterdir())
        report['latest'] = (Path(output) / 'latest').read_text()
        run.steps(1, 2)
        report['then'] = Path(save(run, 1, None)).name
        background.wait()
        fresh = Run(stage, seed=4)
        fresh.load(f'{output}/ckpt_epoch_1')
        report['loads'] = same(weights(run), weights(fresh))
        run.engine.destroy()
        fresh.engine.destroy()
    return found


def save_tags(root: str) -> dict[str, Any]:
    """Two tags each of stages 1 and 3 with an average, and a tag of plain DeepSpeed of each."""
    found = {}
    for stage in (1, 3):
        run = Run(stage, f'{root}/{stage}')
        ema = ShardedEma(run.engine, 0.5)
        paths = []
        for epoch in range(2):
            run.steps(epoch, epoch + 1)
            ema.update()
            paths.append(save(run, epoch, ema))
        run.engine.save_checkpoint(f'{root}/plain', tag=f'stage{stage}')
        found[str(stage)] = {
            'tags': paths,
            'plain': f'{root}/plain/stage{stage}',
            'weights': {name: t.tolist() for name, t in weights(run).items()},
        }
        run.engine.destroy()
    return found


def load_tags(loads: list[Any]) -> list[Any]:
    """Each (tag, stage) into a fresh run: its weights, or why not; and what was warned of."""
    found: list[Any] = []
    for path, stage in loads:
        run = Run(stage, seed=9)
        with caught_warnings() as said:
            try:
                run.load(path)
                average = ShardedEma(run.engine, 0.9)
                load_ema_checkpoint(run.config, average, logger)
                state = {name: t.tolist() for name, t in weights(run).items()}
                found.append({'weights': state, 'updates': average.num_updates, 'said': said})
            except InternvlDsError as error:
                found.append({'error': f'{type(error).__name__}: {error}', 'said': said})
        run.engine.destroy()
    return found


class Windows(nn.Module):
    """Buffers that no state dict has, as timm's Swin, BEiT and RoPE models have them, and more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 13)
        self.head = nn.Linear(13, 5)
        self.register_buffer('index', torch.arange(7), persistent=False)
        self.register_buffer('angles', torch.linspace(0, 1, 13), persistent=False)
        self.register_buffer('seen', torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.stem(x)) * (1 + self.angles.to(x.dtype)))
