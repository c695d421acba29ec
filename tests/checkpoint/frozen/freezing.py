"""What ranks do in test_sharing.py: runs with a frozen layer, saved with CHECKPOINT.FROZEN."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from timm.utils import ModelEmaV3
from torch import distributed, nn

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_checkpoint,
    load_ema_checkpoint,
    load_pretrained,
    save_checkpoint,
)
from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.checkpoint_engine import install_writer
from internvl_ds.checkpoint.formats.shard_files import read_shard
from internvl_ds.checkpoint.frozen import frozen_bytes, sharing
from internvl_ds.checkpoint.tag.manifest import is_shared
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.errors import InternvlDsError
from tests.checkpoint.proving import same, weights
from tests.harness.elastic import (
    ADAM,
    Net,
    Run,
    full_state,
    logger,
    make_client,
    make_scheduler,
)
from tests.harness.model import make_config, module_dtype, precision_values


def run_of(stage: int, output: str, how: str = 'once', seed: int = 0, **values: Any) -> Run:
    """A run; each further value is one of CHECKPOINT."""
    run = Run(stage, output, seed=seed)
    run.config.defrost()
    for key, value in {'FROZEN': how, **values}.items():
        run.config.CHECKPOINT[key] = value
    return run


def save(run: Run, epoch: int, ema: ShardedEma | None = None, **more: Any) -> Path:
    path = save_checkpoint(
        run.config, epoch, run.engine, 50.0, run.optimizer, run.scheduler, run.scaler, logger,
        model_ema=ema, **more,
    )  # fmt: skip
    return Path(path)


def shared_in(folder: Path) -> dict[str, int]:
    """The shared files of a directory, and the inode of each."""
    return {p.name: p.stat().st_ino for p in sorted(folder.iterdir()) if is_shared(p.name)}


def change_frozen(run: Run) -> None:
    """Another value in a layer that is frozen, on all ranks."""
    for name, parameter in run.engine.module.named_parameters():
        if name.startswith('frozen'):
            with torch.no_grad():
                getattr(parameter, 'ds_tensor', parameter).data.add_(1.0)


def frozen(run: Run) -> dict[str, torch.Tensor]:
    named = run.engine.module.named_parameters()
    return {n: getattr(p, 'ds_tensor', p).detach() for n, p in named if n.startswith('frozen')}


def evaluated(tag: Path) -> dict[str, torch.Tensor]:
    """The parameters of a bare module that the tag was loaded into."""
    torch.manual_seed(5)
    model = Net()
    config = make_config(EVAL_MODE=True, MODEL__RESUME=str(tag))
    load_checkpoint(config, model, None, None, None, logger)
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def share(root: str) -> dict[str, Any]:
    """At each stage: three tags that share, one after a change; all that reads one reads all."""
    found: dict[str, Any] = {}
    for stage in range(4):
        got: dict[str, Any] = found.setdefault(str(stage), {})
        run = run_of(stage, f'{root}/{stage}')
        ema = ShardedEma(run.engine, 0.5)
        run.steps(0, 2)
        ema.update()
        first = save(run, 0, ema)
        run.steps(2, 3)
        ema.update()
        second, writer = save(run, 1, ema), install_writer(run.engine)
        got['written'] = [writer.last_size, frozen_bytes.entry_of(frozen(run)).size]
        best = save(run, 1, ema, best='best')
        got['shared'] = [shared_in(tag) for tag in (first, second, best)]
        want, state = weights(run), full_state(run.engine, ADAM)
        averaged = ema.state_dict()
        losses = run.steps(3, 5)
        change_frozen(run)
        third, changed = save(run, 2), weights(run)
        got['changed'] = [shared_in(third), same(evaluated(third), changed)]
        run.engine.destroy()
        got['bare'] = same(evaluated(second), want)
        for other in (stage, (stage + 1) % 4):
            again = run_of(other, f'{root}/other', seed=9)
            again.load(str(second))
            average = ShardedEma(again.engine, 0.9)
            load_ema_checkpoint(again.config, average, logger)
            loaded = [same(weights(again), want), full_state(again.engine, ADAM) == state]
            loaded.append(same(average.state_dict(), averaged))
            got[f'into {other}'] = [*loaded, again.steps(3, 5), losses]
            again.engine.destroy()
        if stage == 1:
            got['timm'] = average_whole(f'{root}/timm')
        if stage in (1, 3):  # the layouts of the file
            got['plain'] = plain_deepspeed(stage, second, want)
    return found


def average_whole(output: str) -> list[Any]:
    """timm's average, whose frozen parameters are those of the model, but for one."""
    run = run_of(1, output)
    ema = ModelEmaV3(run.engine.module, 0.5)
    run.steps(0, 1)
    ema.update(run.engine.module)
    ema.module.frozen.bias.add_(1.0)
    tag = save(run, 0, ema)
    with safe_open(tag / 'ema.safetensors', 'pt') as file:
        held = [name for name in file.keys() if name.startswith('frozen')]  # noqa: SIM118
    run.config.MODEL.RESUME = str(tag)
    other = ModelEmaV3(Net(), 0.5)
    load_ema_checkpoint(run.config, other, logger)
    run.engine.destroy()
    return [held, same(other.module.state_dict(), ema.module.state_dict())]


def plain_deepspeed(stage: int, tag: Path, want: dict[str, torch.Tensor]) -> list[Any]:
    """What DeepSpeed's own load makes of a tag, into a model that has the frozen weights."""
    said: list[Any] = []
    for strict in (True, False):
        run = run_of(stage, '')  # of the same frozen weights; its engine reads as DeepSpeed does
        try:
            run.engine.load_checkpoint(str(tag.parent), tag.name, load_module_strict=strict)
            said.append(same(weights(run), want))
        except RuntimeError as error:
            said.append(str(error))
        install_writer(run.engine)  # from here on it reads what is apart too
        change_frozen(run)
        run.engine.load_checkpoint(str(tag.parent), tag.name)
        said.append(same(weights(run), want))
        run.engine.destroy()
    return said


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def without_links(root: str) -> dict[str, Any]:
    """A file system that has no hard links; in the background; the tags go one after another."""

    found: dict[str, Any] = {}
    before = sharing.os.link
    sharing.os.link = refuse  # type: ignore[assignment]
    try:
        for stage in (1, 3):
            output = Path(f'{root}/{stage}')
            run = run_of(stage, str(output), ASYNC=True)
            run.config.SAVE_CKPT_NUM = 1
            run.steps(0, 1)
            first = save(run, 0)
            run.steps(1, 2)
            async_save.wait()
            names = shared_in(output)
            second, want = save(run, 1), weights(run)
            async_save.wait()
            distributed.barrier()
            got = {'inside': [shared_in(second)], 'gone': not first.exists()}
            got['same'] = names == shared_in(output)
            change_frozen(run)
            got['bare'] = same(evaluated(second), want)
            third = save(run, 2)
            async_save.wait()
            distributed.barrier()
            got['after'] = [sorted(names), sorted(shared_in(output))]
            got['third'] = same(evaluated(third), weights(run))
            run.engine.destroy()
            found[str(stage)] = got
    finally:
        sharing.os.link = before
    return found


def choose(root: str) -> dict[str, Any]:
    """The shared files of two tags, by what 'auto' makes of a model."""
    found, least, link = {}, sharing._WORTH_IT, os.link
    for what, stage, width, worth, how in (
        ('probe 1', 1, 8, 0, 'auto'), ('probe 3', 3, 8, 0, 'auto'), ('half', 1, 100, 0, 'auto'),
        ('small', 1, 8, least, 'auto'), ('no links', 1, 8, 0, 'auto'), ('keep', 1, 8, 0, 'keep'),
        ('once', 1, 100, 0, 'once'),
    ):  # fmt: skip
        sharing._WORTH_IT = worth
        sharing.os.link = refuse if what == 'no links' else link  # type: ignore[assignment]
        config = make_config(
            f'{root}/{what}', DATA__BATCH_SIZE=16 // world_size(), SAVE_CKPT_NUM=0,
            CHECKPOINT__FROZEN=how,
        )  # fmt: skip
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, width))
        model[0].requires_grad_(False)
        client = torch.optim.SGD(model[1].parameters(), lr=0.1)
        engine, _ = initialize(config, model, client, {'zero_optimization': {'stage': stage}})
        tags = [
            save_checkpoint(config, epoch, engine, 0.0, client, None, None, logger)
            for epoch in range(2)
        ]
        found[what] = [shared_in(Path(tag)) for tag in tags]
        engine.destroy()
    sharing._WORTH_IT, sharing.os.link = least, link  # type: ignore[assignment]
    return found


def fail(root: str, tag: str) -> list[str]:
    """What loads of a tag whose shared file is damaged or missing say: of a module, an engine."""
    said = []
    run = run_of(3, f'{root}/other', seed=9)
    before = weights(run)
    for attempt in (lambda: evaluated(Path(tag)), lambda: run.load(tag)):
        try:
            attempt()
            said.append('loaded')
        except InternvlDsError as error:
            said.append(f'{type(error).__name__}: {error}')
    said.append(str(same(weights(run), before)))
    run.engine.destroy()
    return said if rank() == 0 else []


def pretrained_run(
    stage: int, output: str, source: str, seed: int = 0, dtype: str = 'fp32', **values: Any
) -> Run:
    """A run of CHECKPOINT.FROZEN 'omit', whose weights load_pretrained took from a file."""
    run = Run.__new__(Run)
    config = make_config(
        output, DATA__BATCH_SIZE=16 // world_size(), SAVE_CKPT_NUM=0, CHECKPOINT__FROZEN='omit',
        MODEL__PRETRAINED=source, **precision_values(dtype), **values,
    )  # fmt: skip
    run.config, run.dtype = config, module_dtype(dtype)
    config.defrost()
    torch.manual_seed(seed)
    model = Net()
    if source:
        load_pretrained(config, model, logger)
    client = make_client(model, 'adamw')
    run.scheduler = make_scheduler(client)
    zero: dict[str, Any] = {'stage': stage}
    if stage == 3:
        zero['stage3_param_persistence_threshold'] = 10
    run.engine, run.optimizer = initialize(
        config, model, client, {'zero_optimization': zero}, lr_scheduler=run.scheduler
    )
    run.scaler = NativeScalerWithGradNormCount()
    return run


def attempt(act: Callable[[], Any]) -> str:
    try:
        act()
    except InternvlDsError as error:
        return f'{type(error).__name__}: {error}'
    return 'done'


def omit(root: str, source: str) -> dict[str, Any]:
    """At each stage: tags without what is frozen, loaded by all; and what is refused."""
    found: dict[str, Any] = {}
    for stage in range(4):
        dtype = 'bf16' if stage == 2 else 'fp32'
        got: dict[str, Any] = found.setdefault(str(stage), {})
        run = pretrained_run(stage, f'{root}/{stage}', source, dtype=dtype)
        run.steps(0, 2)
        first = save(run, 0)
        run.steps(2, 3)
        second = save(run, 1)
        got['held'] = [[n for n in _names(tag) if 'frozen' in n] for tag in (first, second)]
        want, state, losses = weights(run), full_state(run.engine, ADAM), run.steps(3, 5)
        change_frozen(run)
        got['changed'] = attempt(lambda: save(run, 2))
        run.engine.destroy()
        got['bare'] = [] if stage == 2 else same(evaluated(second), want)
        for other in (stage, (stage + 1) % 4):
            # As the program does: what is resumed is not loaded before.
            again = pretrained_run(other, f'{root}/other', '', seed=9, dtype=dtype)
            again.load(str(second))
            loaded = [same(weights(again), want), full_state(again.engine, ADAM) == state]
            again.config.OUTPUT = f'{root}/{stage}-{other}'
            loaded.append(attempt(lambda: save(again, 3)))
            got[f'into {other}'] = [*loaded, again.steps(3, 5), losses]
            again.engine.destroy()
    plain = pretrained_run(1, f'{root}/none', '')
    found['none'] = attempt(lambda: save(plain, 0))
    plain.engine.destroy()
    return found


def _names(tag: Path) -> list[str]:
    """What the model file of a tag holds, of rank 0."""
    path = next(p for p in sorted(tag.iterdir()) if p.name.endswith('mp_rank_00_model_states.pt'))
    content = read_shard(path)
    return [*content['module'], *(content['frozen_param_fragments'] or {})]


def save_one(root: str) -> None:
    run = run_of(3, f'{root}/run')
    run.steps(0, 1)
    save(run, 0)
    run.engine.destroy()
