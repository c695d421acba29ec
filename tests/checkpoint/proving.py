"""What ranks do in test_proof.py, test_tag_files.py and test_ema_layouts.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import timm
import torch
from torch import distributed, nn

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_checkpoint,
    load_ema_checkpoint,
    save_checkpoint,
)
from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.formats.ema_files import EmaFiles
from internvl_ds.checkpoint.formats.ema_tensors import read_whole_ema
from internvl_ds.checkpoint.formats.export import weights_of_tag
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.tag.output_lock import LOCK
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.errors import InternvlDsError
from tests.harness.elastic import Run
from tests.harness.model import (
    CLASSES,
    FEATURES,
    make_config,
    micro_batch,
    on_device,
    precision_values,
    zero_json,
)
from tests.harness.saving import caught_warnings

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
        async_save.wait()
        module, report = run.engine.module, found.setdefault(str(stage), {})

        def attempt(
            name: str, do: Callable[[], None], undo: Callable[[], None], report: Any, run: Run
        ) -> None:
            do()
            try:
                save(run, 1, None)
                async_save.wait()
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
        report['tags'] = sorted(p.name for p in Path(output).iterdir() if p.name != LOCK)
        report['latest'] = (Path(output) / 'latest').read_text()
        run.steps(1, 2)
        report['then'] = Path(save(run, 1, None)).name
        async_save.wait()
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
    """Buffers that no state dict has, a tied weight, and complex numbers that are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 13)
        self.tied = nn.Linear(13, 13, bias=False)
        self.again = nn.Linear(13, 13, bias=False)
        self.again.weight = self.tied.weight
        self.head = nn.Linear(13, CLASSES)
        filter_ = nn.Parameter(torch.randn(3, 2, dtype=torch.cfloat), requires_grad=False)
        if torch.__version__ >= '2.14':  # others gather none
            self.fixed = nn.ParameterDict({'filter': filter_})
        self.register_buffer('index', torch.randint(99, (7,)), persistent=False)
        self.register_buffer('angles', torch.rand(13), persistent=False)
        self.register_buffer('waves', torch.randn(5, dtype=torch.cfloat))
        self.register_buffer('seen', torch.rand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        x = torch.tanh(self.stem(x)) * (1 + self.angles.to(x.dtype))
        return self.head(self.again(torch.tanh(self.tied(x))))


FAMILIES = {
    'swin_tiny_patch4_window7_224': {
        'embed_dim': 12, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 1, 1),
    },
    'beit_base_patch16_224': {'embed_dim': 24, 'depth': 1, 'num_heads': 2},
    'eva02_tiny_patch14_224': {'embed_dim': 24, 'depth': 1, 'num_heads': 2},
    'vit_small_patch16_dinov3': {'embed_dim': 24, 'depth': 1, 'num_heads': 2},
    'convnext_atto': {'dims': (8, 8, 8, 8), 'depths': (1, 1, 1, 1)},
}  # fmt: skip


def _build(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Windows() if name == 'windows' else timm.create_model(
        name, num_classes=3, **FAMILIES[name]
    )  # fmt: skip


class Averaged:
    """An engine and its average, without a scheduler."""

    def __init__(self, name: str, stage: int, output: str, seed: int) -> None:
        self.config = make_config(output, DATA__BATCH_SIZE=4, SAVE_CKPT_NUM=0)
        self.config.defrost()
        model = _build(name, seed)
        client = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        zero = {
            'stage': stage,
            **({'stage3_param_persistence_threshold': 10} if stage == 3 else {}),
        }
        self.engine, self.optimizer = initialize(
            self.config, model, client, {'zero_optimization': zero}
        )
        self.scaler = NativeScalerWithGradNormCount()
        self.ema = ShardedEma(self.engine, 0.5)

    def whole(self) -> dict[str, torch.Tensor]:
        """All of the average, buffers that are in no state dict included."""
        found = dict(self.ema.state_dict())
        return {**found, **{n: b.clone() for n, b in self.ema._buffers.items()}}


def move_averages(root: str, names: list[str], sources: list[str]) -> dict[str, Any]:
    """Saves averages at each stage; loads those and given ones into every stage.

    Args:
        root: where to.
        names: of models.
        sources: roots of earlier calls, on other numbers of ranks.
    """
    found: dict[str, Any] = {}
    for name in names:
        for stage in range(4):
            run = Averaged(name, stage, f'{root}/{name}/{stage}', seed=stage)
            if name == 'windows':
                for step in range(2):
                    x, y = micro_batch(step, 0, 1, rank(), world_size())
                    run.scaler(nn.functional.cross_entropy(run.engine(x), y), run.optimizer)
                    run.ema.update()
            else:  # a forward pass takes long, and an average is one of any numbers
                for tensor in (*run.ema._shards.values(), *run.ema._buffers.values()):
                    if tensor.is_floating_point():
                        tensor.mul_(0.5)
            save_checkpoint(
                run.config, 0, run.engine, 0.0, run.optimizer, None, run.scaler, logger,
                model_ema=run.ema,
            )  # fmt: skip
            state = run.whole()
            if rank() == 0:
                torch.save(state, f'{root}/{name}/{stage}/whole.pt')
                model = {n: torch.zeros_like(t) for n, t in run.engine.module.state_dict().items()}
                average = {n: t for n, t in state.items() if n in model}
                torch.save({'model': model, 'model_ema': average}, f'{root}/{name}/{stage}/it.pth')
            run.engine.destroy()
        distributed.barrier()
        for source in [root, *sources]:
            for stage in range(4):
                folder = Path(source) / name / str(stage)
                if not folder.exists():
                    continue
                wanted = torch.load(folder / 'whole.pt')
                for kind, path in (('tag', folder / 'ckpt_epoch_0'), ('pth', folder / 'it.pth')):
                    target = (stage + 1 + (kind == 'pth')) % 4
                    other = Averaged(name, target, '', seed=9)
                    own = other.whole()
                    other.config.MODEL.RESUME = str(path)
                    load_ema_checkpoint(other.config, other.ema, logger)
                    got = other.whole()
                    # an average holds nothing frozen, and a .pth no buffer of no state dict
                    kept = {'fixed.filter'} & own.keys()
                    if kind == 'pth':
                        kept |= wanted.keys() - other.engine.module.state_dict().keys()
                    wanted.update({n: own[n] for n in kept})
                    found[f'{folder} {kind} -> {target}'] = same(wanted, got)
                    other.engine.destroy()
    return found


class Shared(nn.Module):
    """One parent has a module and a parameter under two names each, which DeepSpeed overlooks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 13)
        self.body = nn.Linear(13, 13)
        self.again = self.body
        self.frozen = nn.Linear(13, 13).requires_grad_(False)
        self.cold = self.frozen
        self.head = nn.Linear(13, CLASSES)
        self.scale = nn.Parameter(torch.rand(13))
        self.alias = self.scale
        self.register_buffer('grows', torch.rand(2))
        self.register_buffer('lazy', None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(torch.tanh(self.body(torch.tanh(self.stem(x)))))
        return self.head(self.cold(x) * self.scale + self.alias)


class SharedRun:
    """An engine of `Shared`."""

    def __init__(self, stage: int, output: str, seed: int) -> None:
        self.config = make_config(output, DATA__BATCH_SIZE=8, SAVE_CKPT_NUM=0)
        torch.manual_seed(seed)
        model = Shared()
        client = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        self.engine, self.optimizer = initialize(self.config, model, client, zero_json(stage))
        self.scaler = NativeScalerWithGradNormCount()

    def step(self) -> None:
        x, y = micro_batch(self.engine.global_steps, 0, 1, rank(), world_size())
        self.scaler(nn.functional.cross_entropy(self.engine(x), y), self.optimizer)

    def save(self, epoch: int) -> str:
        return save_checkpoint(
            self.config, epoch, self.engine, 0.0, self.optimizer, None, self.scaler, logger
        )

    def state(self) -> dict[str, torch.Tensor]:
        named = self.engine.module.named_parameters(remove_duplicate=False)
        return {**{name: whole(p) for name, p in named}, 'grows': self.engine.module.grows.clone()}


def share(root: str) -> dict[str, Any]:
    """Shared modules through every pair of stages; then saves with buffers that have changed."""
    found: dict[str, Any] = {}
    for stage in range(4):
        run = SharedRun(stage, f'{root}/{stage}', seed=0)
        run.step()
        path, want = run.save(0), run.state()
        report = found[str(stage)] = {}
        changes = {'grown': torch.ones(3), 'gone': None}
        for name, buffer in changes.items():
            run.engine.module.grows = buffer
            report[name] = _message_of_save(run)
        run.engine.module.grows, run.engine.module.lazy = torch.ones(2), torch.ones(1)
        report['new'] = _message_of_save(run)
        report['tags'] = sorted(p.name for p in Path(root, str(stage)).glob('ckpt_*'))
        run.step()
        run.engine.module.grows = want['grows']
        later = run.state()
        run.engine.destroy()
        for target in range(4):
            other = SharedRun(target, '', seed=9)
            other.config.defrost()
            other.config.MODEL.RESUME = path
            load_checkpoint(other.config, other.engine, other.optimizer, None, other.scaler, logger)
            report[str(target)] = same(want, other.state())
            other.step()
            for name, tensor in other.state().items():
                # the gradients' sums are taken in another order at another stage
                if not torch.allclose(tensor, later[name], rtol=1e-4, atol=1e-5):
                    report[str(target)].append(f'{name} after an update')
            other.engine.destroy()
    return found


def _message_of_save(run: SharedRun) -> str:
    try:
        run.save(1)
    except InternvlDsError as error:
        return f'{type(error).__name__}: {error}'
    return 'saved'


def frozen_in_groups(root: str, stage: int, precision: str) -> dict[str, list[str]]:
    """Saves with frozen parameters among the optimizer's, and goes on in two layouts from there.

    Returns:
        The names of the weights that are not those of the run that went on without a save.
    """

    def start(stage: int, resume: str) -> tuple[Any, ...]:
        config = make_config(
            f'{root}/{stage}{resume and "resumed"}', MODEL__RESUME=resume, DATA__BATCH_SIZE=2,
            **precision_values(precision),
        )  # fmt: skip
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES))
        model[0].requires_grad_(False)
        first, second = list(model.parameters())[::2], list(model.parameters())[1::2]
        client = torch.optim.AdamW([{'params': first, 'lr': 0.1}, {'params': second, 'lr': 0.2}])
        engine, optimizer = initialize(config, model, client, zero_json(stage))
        scaler = NativeScalerWithGradNormCount()
        if resume:
            load_checkpoint(config, engine, optimizer, None, scaler, logger)
        return config, engine, optimizer, scaler

    def train_on(parts: Any, number: int) -> None:
        engine, optimizer, scaler = parts
        draw = torch.Generator().manual_seed(number)
        images = torch.randn(2, FEATURES, generator=draw).to(next(engine.parameters()).dtype)
        scaler(engine(on_device(images)).float().square().sum(), optimizer, 5.0)

    def named(engine: Any) -> dict[str, torch.Tensor]:
        return {name: whole(p) for name, p in engine.module.named_parameters()}

    config, *running = start(stage, '')
    train_on(running, 0)
    engine, optimizer, scaler = running
    tag = save_checkpoint(config, 0, engine, 0.0, optimizer, None, scaler, logger)
    train_on(running, 1)
    differences = {}
    for other in (stage, 1 if stage != 1 else 0):
        resumed = start(other, tag)[1:]
        train_on(resumed, 1)
        got, right = named(resumed[0]), named(engine)
        if other != stage:
            # Another stage sums the norm, by which this update is clipped, in another order: some
            # roundings of 2^-24.
            got = {
                n: right[n] if torch.allclose(t, right[n], 1e-6, 0) else t for n, t in got.items()
            }
        differences[f'{stage} -> {other}'] = same(got, right)
    return differences
