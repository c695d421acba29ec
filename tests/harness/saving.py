"""What ranks do in test_checkpoint_api.py."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn

from internvl_ds import (
    NativeScalerWithGradNormCount,
    auto_resume_helper,
    initialize,
    load_checkpoint,
    load_ema_checkpoint,
    save_checkpoint,
)
from internvl_ds.checkpoint.tag.output_lock import LOCK
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from tests.engine.stepping import masters
from tests.harness.calls import message_of
from tests.harness.model import (
    make_config,
    make_model,
    make_optimizer,
    micro_batch,
    module_dtype,
    precision_values,
    zero_json,
)

logger = logging.getLogger('test')
ACCUMULATION = 2


@contextmanager
def caught_warnings() -> Iterator[list[str]]:
    """The warnings that the adapters log through the script's logger meanwhile."""
    caught: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: caught.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield caught
    finally:
        logger.removeHandler(handler)


class Run:
    """A training run: engine, scheduler, scaler, EMA, and how to take steps."""

    def __init__(
        self, stage: int, precision: str, output: str, seed: int = 0, **values: Any
    ) -> None:
        self.config = make_config(
            output,
            DATA__BATCH_SIZE=16 // ACCUMULATION // world_size(),
            TRAIN__ACCUMULATION_STEPS=ACCUMULATION,
            **{**precision_values(precision), **values},
        )
        self.dtype = module_dtype(precision)
        model = make_model(seed)
        client = make_optimizer(model)
        self.scheduler = CosineLRScheduler(
            client, t_initial=30, warmup_t=4, warmup_lr_init=1e-4, t_in_epochs=False
        )
        self.engine, self.optimizer = initialize(
            self.config, model, client, zero_json(stage), lr_scheduler=self.scheduler
        )
        self.scaler = NativeScalerWithGradNormCount()
        self.ema = ShardedEma(self.engine, 0.9)

    def steps(self, first: int, last: int) -> list[list[float]]:
        """Updates first..last-1; returns the (mean loss, norm, lr) of each, exactly."""
        seen = []
        for step in range(first, last):
            total = torch.zeros((), device=self.engine.device)
            for micro in range(ACCUMULATION):
                x, y = micro_batch(step, micro, ACCUMULATION, rank(), world_size())
                logits = self.engine(x.to(self.dtype)).float()
                loss = nn.functional.cross_entropy(logits, y) / ACCUMULATION
                total += loss.detach()
                norm = self.scaler(loss, self.optimizer, 0.5, update_grad=micro == ACCUMULATION - 1)
            self.ema.update()
            lrs = [g['lr'] for g in self.optimizer.param_groups]
            seen.append([float(total), float(norm), *lrs])
        return seen

    def save(self, epoch: int, accuracy: float = 0.0, **more: Any) -> str:
        return save_checkpoint(
            self.config, epoch, self.engine.module, accuracy, self.optimizer, self.scheduler,
            self.scaler, logger, **{'model_ema': self.ema, **more},
        )  # fmt: skip

    def load(self, resume: str, **values: Any) -> float:
        config = self.config.clone()
        config.defrost()
        config.MODEL.RESUME = resume
        for key, value in values.items():
            config[key] = value
        config.freeze()
        self.config = config
        return load_checkpoint(
            config, self.engine.module, self.optimizer, self.scheduler, self.scaler, logger
        )

    def logits(self) -> list[float]:
        self.engine.eval()
        x, _ = micro_batch(999, 0, 1, 0, 1)
        with torch.no_grad():
            out = self.engine(x.to(self.dtype)).float().flatten().tolist()
        self.engine.train()
        return out

    def close(self) -> None:
        self.engine.destroy()


def train_and_save(stages: list[int], precision: str, root: str) -> dict[str, Any]:
    """Six updates, a save, then four more: the run that did not stop."""
    results = {}
    for stage in stages:
        run = Run(stage, precision, f'{root}/zero{stage}')
        run.steps(0, 6)
        path = run.save(3, 81.5, max_accuracy_ema=79.25, ema_decay=0.9)
        results[str(stage)] = {
            'path': path,
            'next': run.steps(6, 10),
            'masters': masters(run.engine),
            'ema': _ema_numbers(run),
        }
        run.close()
    return results


def resume_and_go_on(stages: list[int], precision: str, root: str) -> dict[str, Any]:
    """A fresh process, other initial weights: load the newest tag and make the same four."""
    results = {}
    for stage in stages:
        run = Run(stage, precision, f'{root}/zero{stage}', seed=7)
        resume = auto_resume_helper(run.config.OUTPUT)
        accuracy = run.load(resume)
        accuracy_ema = load_ema_checkpoint(run.config, run.ema, logger)
        results[str(stage)] = {
            'path': resume,
            'accuracy': accuracy,
            'accuracy_ema': accuracy_ema,
            'start_epoch': run.config.TRAIN.START_EPOCH,
            'next': run.steps(6, 10),
            'masters': masters(run.engine),
            'ema': _ema_numbers(run),
            'counts': [run.engine.global_steps, run.engine.micro_steps],
        }
        run.close()
    return results


def _ema_numbers(run: Run) -> list[Any]:
    values = [v for t in run.ema._shards.values() for v in t.detach().flatten().tolist()]
    return [run.ema.decay, run.ema.num_updates, values]


def evaluate_by_name(stages: list[int], precision: str, root: str) -> dict[str, Any]:
    """Saves epochs 0 and 1 with other weights; `latest` names 1; loads 0 in EVAL_MODE."""
    results = {}
    for stage in stages:
        output = f'{root}/zero{stage}'
        run = Run(stage, precision, output, SAVE_CKPT_NUM=5)
        run.steps(0, 2)
        first = run.logits()
        run.save(0, 50.0)
        run.steps(2, 4)
        second = run.logits()
        run.save(1, 60.0)
        run.close()
        fresh = Run(stage, precision, output, seed=3)
        accuracy = fresh.load(f'{output}/ckpt_epoch_0', EVAL_MODE=True)
        got = fresh.logits()
        start_epoch = fresh.config.TRAIN.START_EPOCH
        fresh.close()
        plain = make_model(5)
        config = make_config(output, EVAL_MODE=True, MODEL__RESUME=f'{output}/ckpt_epoch_0')
        load_checkpoint(config, plain, None, None, None, logger)
        plain = plain.eval().to(module_dtype(precision))
        x, _ = micro_batch(999, 0, 1, 0, 1)
        with torch.no_grad():
            plain_logits = plain(x.to(next(plain.parameters()).dtype)).float().flatten().tolist()
        results[str(stage)] = {
            'first': first,
            'second': second,
            'got': got,
            'plain': plain_logits,
            'accuracy': accuracy,
            'start_epoch': start_epoch,
            'latest': Path(output, 'latest').read_text(),
        }
    return results


def save_on_rank_0_only(stage: int, root: str) -> str:
    values = {'CHECKPOINT__RENDEZVOUS_TIMEOUT': 3, 'COMM__WARN_AFTER': 1}
    run = Run(stage, 'fp32', root, **values)
    run.steps(0, 1)
    if rank() == 1:
        time.sleep(1.6)  # only slower: every other save comes at once
    for _ in range(2):
        run.save(0, best='slow')
    if rank() == 0:
        run.save(0)
    run.steps(1, 2)
    return 'no error'


def save_with_another_epoch(root: str, best: str | None) -> str:
    run = Run(0, 'fp32', root)
    try:
        run.save(rank(), best=best)
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    return 'no error'


def save_that_fails_on_rank_1(stage: int, root: str) -> dict[str, Any]:
    """Rank 1 cannot write its shard: all ranks hear of it, and training goes on."""
    run = Run(stage, 'fp32', root)
    run.steps(0, 1)
    run.save(0)
    original = torch.save
    if rank() == 1:

        def no_space(*_: Any, **__: Any) -> None:
            raise OSError(28, 'No space left on device')

        torch.save = no_space
    try:
        run.save(1)
        error = 'no error'
    except Exception as failure:
        error = f'{type(failure).__name__}: {failure}'
    torch.save = original
    after = run.steps(1, 2)
    run.save(2)
    return {
        'error': error,
        'after': after,
        'left': sorted(p.name for p in Path(root).iterdir() if p.is_dir()),
        'latest': Path(root, 'latest').read_text(),
    }


def load_errors(root: str) -> dict[str, str]:
    """Saves stage 2 in fp32, then tries what cannot work; each rank reports the messages."""
    run = Run(2, 'fp32', f'{root}/two', SAVE_CKPT_NUM=5)
    run.steps(0, 1)
    path = run.save(0)
    messages = {}

    def attempt(name: str, action: Any) -> None:
        try:
            action()
            messages[name] = 'no error'
        except Exception as error:
            messages[name] = f'{type(error).__name__}: {error}'

    attempt('missing', lambda: run.load(f'{root}/two/ckpt_epoch_9'))
    attempt('empty', lambda: run.load(''))
    attempt('no directory', lambda: run.load(f'{root}/nowhere'))
    attempt('pth', lambda: run.load(__file__))
    other = Run(1, 'fp32', f'{root}/one', seed=4)
    other_ema = other.save(0)
    fresh = masters(other.engine)
    attempt('stage', lambda: other.load(path))
    attempt('touched', lambda: _require(masters(other.engine) != fresh))
    other.close()
    attempt('ema type', lambda: run.save(1, model_ema=nn.Linear(2, 2)))
    whole = run.save(1, model_ema=ModelEmaV3(make_model(5)))
    kept = [t.clone() for t in run.ema._shards.values()]
    for name, resume in (('whole ema', whole), ('other ema', other_ema)):
        config = make_config('', MODEL__RESUME=resume)
        attempt(name, lambda c=config: load_ema_checkpoint(c, run.ema, logger))
    differ = not all(map(torch.equal, kept, run.ema._shards.values()))
    attempt('ema loaded', lambda: _require(differ))
    run.close()
    three = Run(3, 'fp32', f'{root}/three')
    three.steps(0, 1)
    partitioned = {**zero_json(3), 'train_micro_batch_size_per_gpu': 8}
    with deepspeed.zero.Init(config_dict_or_path=partitioned):
        empty = ModelEmaV3(make_model())  # a copy of what zero.Init has partitioned
    attempt('partitioned ema', lambda: three.save(0, model_ema=empty))
    three.close()
    for stage in (0, 2):
        two = Run(stage, 'fp32', f'{root}/groups{stage}')
        two.steps(0, 1)
        saved, trained_masters = two.save(0), masters(two.engine)
        two.close()
        model = make_model(6)
        trained = [p for p in model.parameters() if p.requires_grad]
        engine, optimizer = initialize(
            two.config, model, torch.optim.AdamW(trained, lr=1e-2), zero_json(stage)
        )
        config = make_config('', MODEL__RESUME=saved)
        attempt(
            f'groups {stage}',
            lambda o=optimizer, c=config: load_checkpoint(c, o, o, None, None, logger),
        )
        attempt(
            f'group state {stage}',
            lambda e=engine, t=trained_masters: _require(masters(e) == t),
        )
        messages[f'decay {stage}'] = str([g['weight_decay'] for g in optimizer.param_groups])
        engine.destroy()
    wide = nn.Sequential(nn.Linear(12, 19), nn.Linear(19, 3))
    config = make_config('', EVAL_MODE=True, MODEL__RESUME=path)
    attempt('model', lambda: load_checkpoint(config, wide, None, None, None, logger))
    config = make_config(f'{root}/plain')
    attempt(
        'no engine',
        lambda: save_checkpoint(config, 0, make_model(), 0.0, None, None, None, logger),
    )
    return messages


def _require(condition: bool) -> None:
    assert condition


def ema_in_place(stages: list[int], precision: str) -> dict[str, Any]:
    """The gathered average against one kept by hand, and evaluation with it in place."""
    results = {}
    for stage in stages:
        run = Run(stage, precision, '')
        expected = {n: torch.tensor(v) for n, v in masters(run.engine).items()}
        for step in range(5):
            run.steps(step, step + 1)
            for name, value in masters(run.engine).items():
                expected[name].lerp_(torch.tensor(value), 1.0 - 0.9)
        before, logits = masters(run.engine), run.logits()
        with run.ema.swapped_in():
            averaged = masters(run.engine)
            inside = run.logits()
        try:
            with run.ema.swapped_in():
                raise RuntimeError('evaluation failed')
        except RuntimeError:
            pass
        off = max(
            float((torch.tensor(averaged[n]) - value).abs().max()) for n, value in expected.items()
        )
        results[str(stage)] = {
            'off': off,
            'inside_differs': inside != logits,
            'restored': masters(run.engine) == before and run.logits() == logits,
            'inside': inside,
            'seen': float(run.ema._buffers['seen']),
        }
        run.close()
    return results


def retain(root: str, runs: list[Any]) -> dict[str, Any]:
    """Saves in several runs of other settings, one after the other in one directory."""
    listings = []
    for keep, freq, epochs in runs:
        run = Run(1, 'fp32', root, SAVE_CKPT_NUM=keep, SAVE_FREQ=freq)
        run.steps(0, 1)
        run.save(epochs[0], best='best')
        run.save(epochs[0], best='ema_best')
        for epoch in epochs:
            if epoch % freq == 0:
                run.save(epoch)
                listings.append(_epoch_tags(root))
        run.close()
    return {
        'epoch_tags': listings,
        'others': sorted(p.name for p in Path(root).glob('ckpt_epoch_*best')),
        'latest': Path(root, 'latest').read_text(),
        'hidden': sorted(p.name for p in Path(root).glob('.*') if p.name != LOCK),
    }


def _epoch_tags(root: str) -> list[str]:
    names = [p.name for p in Path(root).glob('ckpt_epoch_*') if p.name[11:].isdigit()]
    return sorted(names, key=lambda name: int(name[11:]))


def rewind(root: str) -> dict[str, Any]:
    """Saves epochs 8 and 9, goes back to an older state, and saves epoch 4."""
    run = Run(1, 'fp32', root, SAVE_CKPT_NUM=2)
    run.steps(0, 1)
    for epoch in (8, 9, 4):
        run.save(epoch)
    newest = auto_resume_helper(root)
    run.close()
    return {'tags': _epoch_tags(root), 'newest': Path(newest).name}


def start_again(stages: list[int], root: str) -> dict[str, Any]:
    """A script that calls load_checkpoint with MODEL.RESUME, and is started again as it was."""
    results = {}
    for stage in stages:
        output, found = f'{root}/new{stage}', {}
        first = Run(stage, 'fp32', f'{root}/other{stage}')
        first.steps(0, 2)
        asked = first.save(0, 10.0, max_accuracy_ema=11.0)
        found['asked'] = [masters(first.engine), _ema_numbers(first), 1, 10.0, 11.0]
        first.close()
        for name, explicit in (('first', False), ('again', False), ('explicit', True)):
            run = Run(stage, 'fp32', output, seed=7, TRAIN__AUTO_RESUME=not explicit)
            with caught_warnings() as warnings:
                best = run.load(asked)
                if name == 'again' and rank() == 0:  # no resume may mix two tags
                    shutil.copytree(found['tag'], f'{output}/ckpt_epoch_9')
                    Path(output, 'latest').write_text('ckpt_epoch_9')
                torch.distributed.barrier()
                best_ema = load_ema_checkpoint(run.config, run.ema, logger)
            start_epoch = run.config.TRAIN.START_EPOCH
            found[name] = [masters(run.engine), _ema_numbers(run), start_epoch, best, best_ema]
            found[f'{name} said'] = [line for line in warnings if 'MODEL.RESUME' in line]
            if name == 'first':
                run.steps(2, 4)
                found['tag'] = run.save(1, 20.0, max_accuracy_ema=21.0)
                found['saved'] = [masters(run.engine), _ema_numbers(run), 2, 20.0, 21.0]
            run.close()
        results[str(stage)] = found
    return results


def timm_ema(root: str) -> dict[str, Any]:
    """timm's three averages through a tag, and a sharded one into timm's."""
    results: dict[str, Any] = {}
    run = Run(2, 'fp32', f'{root}/out')
    run.steps(0, 3)
    config = run.config.clone()
    config.defrost()
    for number, kind in enumerate((ModelEma, ModelEmaV2, ModelEmaV3)):
        kept = kind(make_model(number), decay=0.5)
        config.MODEL.RESUME = save_checkpoint(
            config, number, run.engine, 0.0, run.optimizer, None, None, logger,
            model_ema=kept, ema_decay=0.75,
        )  # fmt: skip
        fresh = kind(make_model(9), decay=0.5)
        load_ema_checkpoint(config, fresh, logger)
        a, b = (m.ema if kind is ModelEma else m.module for m in (kept, fresh))
        same = all(torch.equal(v, b.state_dict()[n]) for n, v in a.state_dict().items())
        results[kind.__name__] = [same, fresh.decay]
    config.MODEL.RESUME = run.save(7)
    target = ModelEmaV3(make_model(9))
    load_ema_checkpoint(config, target, logger)
    with run.ema.swapped_in():
        averaged = masters(run.engine)
    state = target.module.state_dict()
    results['from shards'] = max(
        float((state[n].flatten() - torch.tensor(v)).abs().max()) for n, v in averaged.items()
    )
    config.MODEL.RESUME = save_checkpoint(
        config, 8, run.engine, 0.0, run.optimizer, None, None, logger
    )
    with caught_warnings() as warnings:
        accuracy = load_ema_checkpoint(config, target, logger)
    results['without'] = [accuracy, warnings[-1].partition(' ')[2]]
    run.close()
    results['of an engine'] = _timm_emas_of_engines(root)
    return results


def _timm_emas_of_engines(root: str) -> dict[str, Any]:
    """timm's averages of the modules of engines, beside the sharded one."""
    found: dict[str, Any] = {}
    kinds = (ModelEma, ModelEmaV2, ModelEmaV3)
    for stage, precision in ((0, 'fp32'), (1, 'fp32'), (2, 'fp32'), (1, 'bf16'), (3, 'fp32')):
        run = Run(stage, precision, f'{root}/of-{stage}-{precision}', SAVE_CKPT_NUM=0)
        if stage == 3:
            found['3'] = [message_of(lambda k=k: k(run.engine.module, 0.9)) for k in kinds]
            found['engine'] = [message_of(lambda k=k: k(run.engine, 0.9)) for k in kinds]
            run.close()
            continue
        averages = [kind(run.engine.module, decay=0.9) for kind in kinds]
        for step in range(3):
            run.steps(step, step + 1)
            for number, average in enumerate(averages):
                average.update(run.engine if number else run.engine.module)
        wanted, config = run.ema.state_dict(), run.config.clone()
        config.defrost()
        for number, average in enumerate(averages):
            with caught_warnings() as warnings:
                config.MODEL.RESUME = run.save(number, model_ema=average)
            fresh = kinds[number](run.engine.module, decay=0.5)
            load_ema_checkpoint(config, fresh, logger)
            name = 'module' if number else 'ema'
            saved, state = getattr(average, name).state_dict(), getattr(fresh, name).state_dict()
            # timm averages a tied weight once for each of its names
            names = [n for n in wanted if not n.startswith(('tied', 'again'))]
            off = max(float((state[n].float() - wanted[n]).abs().max()) for n in names)
            same = all(torch.equal(v, state[n]) for n, v in saved.items())
            found[f'{stage} {precision} {number}'] = [same, off, warnings]
        run.close()
    return found


def interchange(stages: list[int], root: str) -> dict[str, Any]:
    """A tag of plain DeepSpeed into ours, and one of ours into plain DeepSpeed."""
    results = {}
    for stage in stages:
        output = f'{root}/zero{stage}'
        run = Run(stage, 'fp32', output)
        run.steps(0, 2)
        run.engine.save_checkpoint(f'{output}/plain', tag='global_step2')
        saved = masters(run.engine)
        path = run.save(0)
        converted = True
        if stage in (1, 2, 3):
            state = get_fp32_state_dict_from_zero_checkpoint(output, tag=Path(path).name)
            converted = all(state[n].flatten().tolist() == v for n, v in saved.items())
        run.close()
        ours = Run(stage, 'fp32', output, seed=5)
        with caught_warnings() as warnings:
            ours.load(f'{output}/plain/global_step2')
        same = masters(ours.engine) == saved
        start_epoch = ours.config.TRAIN.START_EPOCH
        ours.close()
        plain = Run(stage, 'fp32', output, seed=6)
        plain.engine.load_checkpoint(output, tag=Path(path).name)
        results[str(stage)] = {
            'plain into ours': same,
            'ours into plain': masters(plain.engine) == saved,
            'zero_to_fp32': converted,
            'warned': any('does not say its epoch' in w for w in warnings),
            'start_epoch': start_epoch,
        }
        plain.close()
    return results


class Payload:
    """Pickles as a call that makes a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.target),)


def hostile(root: str, target: str) -> list[str]:
    """Puts a payload into each kind of shard, then loads for training and for evaluation."""
    messages = []
    for index, pattern in enumerate(('*model_states.pt', '*optim_states.pt')):
        run = Run(3, 'fp32', f'{root}/{index}')
        run.steps(0, 1)
        run.engine.save_checkpoint(f'{root}/{index}', tag='tag')
        if rank() == 0:
            for path in Path(root, str(index), 'tag').glob(pattern):
                state = torch.load(path, weights_only=False)
                state['ds_version'] = Payload(target)
                torch.save(state, path)
        torch.distributed.barrier()
        for eval_mode in (False, True):
            try:
                run.load(f'{root}/{index}/tag', EVAL_MODE=eval_mode)
                messages.append('no error')
            except Exception as error:
                messages.append(f'{type(error).__name__}: {error}')
        run.close()
    return messages


def resume_with_other_settings(root: str) -> dict[str, Any]:
    """Saves, then resumes with another weight decay and a longer schedule."""
    first = Run(2, 'fp32', root)
    first.steps(0, 2)
    path = first.save(0)
    first.close()
    model = make_model()
    client = make_optimizer(model)
    for group in client.param_groups:
        group['weight_decay'] *= 10
    scheduler = CosineLRScheduler(
        client, t_initial=90, warmup_t=4, warmup_lr_init=1e-4, t_in_epochs=False
    )
    config = make_config('', DATA__BATCH_SIZE=8, MODEL__RESUME=path)
    engine, optimizer = initialize(config, model, client, zero_json(2), lr_scheduler=scheduler)
    with caught_warnings() as warnings:
        load_checkpoint(config, engine, optimizer, scheduler, None, logger)
    return {
        'weight_decay': sorted(g['weight_decay'] for g in optimizer.param_groups),
        't_initial': scheduler.t_initial,
        'warnings': warnings,
    }
