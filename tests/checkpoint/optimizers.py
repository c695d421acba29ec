"""What ranks do in test_optimizer_state.py: tags of one optimizer, and runs that have another."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import Adan, Lion, Lookahead, NAdamW
from torch import distributed, nn

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_checkpoint,
    save_checkpoint,
)
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.errors import InternvlDsError
from tests.harness.elastic import full_state, make_scheduler
from tests.harness.model import CLASSES, FEATURES, make_config, micro_batch
from tests.harness.saving import caught_warnings

logger = logging.getLogger('test')

# name -> how it is made, its class, and the tensors that it keeps for each parameter
KINDS: dict[str, Any] = {
    'sgd': (lambda groups: torch.optim.SGD(groups, lr=0.05), 'SGD', []),
    'momentum': (
        lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9), 'SGD', ['momentum_buffer']
    ),
    'adamw': (
        lambda groups: torch.optim.AdamW(groups, lr=0.01), 'AdamW', ['exp_avg', 'exp_avg_sq']
    ),
    'amsgrad': (
        lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
        'AdamW', ['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq'],
    ),
    'adamax': (
        lambda groups: torch.optim.Adamax(groups, lr=0.01), 'Adamax', ['exp_avg', 'exp_inf']
    ),
    'rmsprop': (lambda groups: torch.optim.RMSprop(groups, lr=0.01), 'RMSprop', ['square_avg']),
    'lion': (lambda groups: Lion(groups, lr=0.001), 'Lion', ['exp_avg']),
}  # fmt: skip
UPDATES, MORE = 2, 2


def small_model() -> nn.Module:
    """Whose sizes divide by nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, CLASSES))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """One a tensor, of two settings: without weight decay, and with it."""
    return [
        {'params': [p], 'weight_decay': 0.0 if p.dim() == 1 else 0.05} for p in model.parameters()
    ]


class Run:
    """A small model that one optimizer trains, and how to take updates, save and load."""

    def __init__(self, kind: Any, stage: int, output: str, **json_config: Any) -> None:
        batch = 16 // world_size()
        self.config = make_config(output, DATA__BATCH_SIZE=batch, SAVE_CKPT_NUM=0)
        model = small_model()
        client = (_make(kind) if isinstance(kind, str) else kind)(groups_of(model))
        self.scheduler = make_scheduler(client)
        zero = {'stage': stage, **({'stage3_param_persistence_threshold': 0} if stage == 3 else {})}
        self.engine, self.optimizer = initialize(
            self.config, model, client, {'zero_optimization': zero, **json_config},
            lr_scheduler=self.scheduler,
        )  # fmt: skip
        self.scaler = NativeScalerWithGradNormCount()

    def steps(self, count: int) -> str:
        """So many updates more; returns what there is then."""
        for _ in range(count):
            x, y = micro_batch(self.engine.global_steps, 0, 1, rank(), world_size())
            loss = nn.functional.cross_entropy(self.engine(x), y)
            self.scaler(loss, self.optimizer, 5.0)
        return self.digest()

    def save(self, epoch: int) -> str:
        return save_checkpoint(
            self.config, epoch, self.engine, 50.0, self.optimizer, self.scheduler, self.scaler,
            logger,
        )  # fmt: skip

    def load(self, resume: str, epoch: bool = True) -> str:
        """What `load_checkpoint` said: '' or an error's class and text."""
        config = self.config.clone()
        config.defrost()
        config.MODEL.RESUME = resume
        try:
            load_checkpoint(
                config, self.engine, self.optimizer, self.scheduler, self.scaler, logger
            )
        except InternvlDsError as error:
            assert config.TRAIN.START_EPOCH == self.config.TRAIN.START_EPOCH
            return f'{type(error).__name__}: {error}'
        assert (UPDATES + 1 if epoch else 0) == config.TRAIN.START_EPOCH
        return ''

    def state(self) -> dict[str, Any]:
        """All that a load may change, bit for bit, but for START_EPOCH and random numbers."""
        optimizer: Any = self.engine.basic_optimizer
        holder = getattr(optimizer, '_base_optimizer', optimizer)  # of timm's Lookahead
        groups = [{k: v for k, v in g.items() if k != 'params'} for g in optimizer.param_groups]
        return {
            'masters': list(wrapper_of(self.engine).masters().values()),
            'module': dict(self.engine.module.state_dict()),
            'state': [holder.state.get(master, {}) for master in self._tensors()],
            'states': len(holder.state),
            'groups': groups,
            'schedule': self.scheduler.state_dict(),
            'scaler': self.scaler.state_dict(),
            'counts': [
                self.engine.global_steps, self.engine.skipped_steps, self.engine.global_samples,
            ],
        }  # fmt: skip

    def digest(self) -> str:
        text = json.dumps(_plain({**self.state(), 'rng': torch.get_rng_state()}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _tensors(self) -> list[Any]:
        if self.engine.zero_optimization_stage():
            return list(wrapper_of(self.engine).masters().values())
        return [p for g in self.engine.basic_optimizer.param_groups for p in g['params']]

    def close(self) -> None:
        self.engine.destroy()


def _plain(value: Any) -> Any:
    """A tree as JSON, which is the same text for the same bits only."""
    if isinstance(value, torch.Tensor):
        own = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(own).hexdigest()]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, int | str | None) else repr(value)


def _amsgrad(without_decay: bool, with_decay: bool) -> Any:
    """AdamW whose groups without and with weight decay have each an amsgrad of their own."""

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        for group in groups:
            group['amsgrad'] = with_decay if group['weight_decay'] else without_decay
        return torch.optim.AdamW(groups, lr=0.01)

    return make, 'AdamW', []


def _momentum(without_decay: float, with_decay: float) -> Any:
    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        for group in groups:
            group['momentum'] = with_decay if group['weight_decay'] else without_decay
        return torch.optim.SGD(groups, lr=0.01)

    return make, 'SGD', []


GROUPS = {
    'amsgrad, both': _amsgrad(True, True), 'amsgrad, with decay': _amsgrad(False, True),
    'amsgrad, without': _amsgrad(True, False), 'momentum, with decay': _momentum(0.0, 0.9),
    'momentum, without': _momentum(0.9, 0.0),
}  # fmt: skip


class Shy(torch.optim.SGD):
    """An optimizer that cannot be tried on a tensor of its own."""

    def step(self, closure: Any = None) -> Any:
        if any(p.numel() == 3 for group in self.param_groups for p in group['params']):
            raise RuntimeError('this is no parameter of the model')
        return super().step(closure)


# Further ones for `load_classes` and `load_counted`.
OTHERS: dict[str, Any] = {
    'adam': lambda groups: torch.optim.Adam(groups, lr=0.01),
    'foreach': lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    'fused': lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    'radam': lambda groups: torch.optim.RAdam(groups, lr=0.01),
    'nadamw': lambda groups: NAdamW(groups, lr=0.01),
    'shy': lambda groups: Shy(groups, lr=0.01, momentum=0.9),
    'adan': lambda groups: Adan(groups, lr=0.01),
    'lookahead': lambda groups: Lookahead(torch.optim.AdamW(groups, lr=0.01), k=3),
    'adafactor': lambda groups: torch.optim.Adafactor(groups, lr=0.01),
}


def _make(kind: str) -> Any:
    table = {**KINDS, **GROUPS}
    return table[kind][0] if kind in table else OTHERS[kind]


def save_kinds(root: str, stages: list[int], table: str = 'KINDS') -> dict[str, Any]:
    """'stage kind' -> the tag of a run after its updates, and what there is then and later."""
    found = {}
    for stage in stages:
        for kind, (_, _, keys) in globals()[table].items():
            run = Run(kind, stage, f'{root}/{world_size()}x{stage}{kind}')
            then = run.steps(UPDATES)
            path, named = run.save(UPDATES), full_state(run.engine, keys)
            later = run.steps(MORE)
            found[f'{stage} {kind}'] = {
                'path': path, 'then': then, 'later': later,
                'named': named, 'named later': full_state(run.engine, keys),
            }  # fmt: skip
            run.close()
    return found


def load_kinds(
    saved: dict[str, Any], sources: dict[str, list[int]], table: str = 'KINDS'
) -> dict[str, dict[str, Any]]:
    """For each stage of a run, tags of these stages: every optimizer's into every one's run."""
    found = {}
    for stage, of_tags in sources.items():
        for kind, (_, _, keys) in globals()[table].items():
            run = Run(kind, int(stage), '')
            before = run.steps(1)
            said = {}
            for source, other in itertools.product(of_tags, globals()[table]):
                if other != kind:
                    said[f'{source} {other}'] = run.load(saved[f'{source} {other}']['path'])
                    assert run.digest() == before, (source, other, kind)
            # it goes on as if nothing had been tried
            run.steps(UPDATES - 1)
            said['then'] = full_state(run.engine, keys)
            run.steps(1)
            for source in of_tags:
                said[str(source)] = {
                    'error': run.load(saved[f'{source} {kind}']['path']),
                    'then': run.digest(), 'named': full_state(run.engine, keys),
                    'later': run.steps(MORE), 'named later': full_state(run.engine, keys),
                }  # fmt: skip
            found[f'{stage} {kind}'] = said
            run.close()
    return found


def load_file(folder: str) -> dict[str, Any]:
    """A plain loop's .pth of every optimizer into a run of AdamW and one of SGD."""
    found: dict[str, Any] = {}
    for running in ('adamw', 'sgd', 'momentum'):
        run = Run(running, 1, '')
        before = run.digest()
        for kind, (make, *_) in KINDS.items():
            model = small_model()
            client = make(groups_of(model))
            for step in range(UPDATES):
                x, y = micro_batch(step, 0, 1, 0, 1)
                client.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                client.step()
            path = f'{folder}/{running}{kind}.pth'
            state = {
                'model': model.state_dict(),
                'optimizer': client.state_dict(),
                'epoch': UPDATES,
            }
            state['lr_scheduler'] = {'last_epoch': UPDATES}
            if rank() == 0:
                torch.save(state, path)
            distributed.barrier()
            if kind != running:
                found[f'{kind} -> {running}'] = run.load(path)
                assert run.digest() == before, (kind, running)
        found[f'{running} -> {running}'] = run.load(f'{folder}/{running}{running}.pth')
        run.close()
    return found


def load_classes(root: str, stage: int, loads: list[list[Any]]) -> list[list[Any]]:
    """What loads, and with which warnings, where class and keys do not say the same.

    Args:
        root: where tags go.
        stage: of the tags.
        loads: (tag, kind of the run, its stage); a tag is a kind, with 'plain ' before it for one
            of DeepSpeed's own save, and 'new ' before that for one of no update.
    """
    tags: dict[str, str] = {}
    for name in sorted({load[0] for load in loads}):
        run = Run(_make(name.split()[-1]), stage, f'{root}/{name}')
        run.steps(0 if name.startswith('new') else UPDATES)
        if 'plain' in name:
            run.engine.save_checkpoint(f'{root}/{name}', tag='tag')
            tags[name] = f'{root}/{name}/tag'
        else:
            tags[name] = run.save(UPDATES)
        run.close()
    runs: dict[tuple[str, int], Run] = {}
    found = []
    for name, kind, own_stage in loads:
        if (kind, own_stage) not in runs:
            runs[kind, own_stage] = Run(_make(kind), own_stage, '')
        run = runs[kind, own_stage]
        before = run.steps(1)
        with caught_warnings() as warnings:
            said = run.load(tags[name], epoch='plain' not in name)
        assert run.digest() == before or not said, (name, kind)
        found.append([said, warnings])
    for run in runs.values():
        run.steps(1)
        run.close()
    return found


def load_without_optimizer(root: str) -> list[str]:
    """A tag into engines without an optimizer, at the stages that DeepSpeed makes one at."""
    found = []
    for stage in (0, 3):
        run = Run('adamw', stage, f'{root}/{stage}')
        path = run.save(UPDATES)
        run.close()
        zero = {'zero_optimization': {'stage': stage}}
        run.engine, run.optimizer = initialize(run.config, small_model(), None, zero)
        found.append(run.load(path))
        run.close()
    return found


def load_counted(root: str) -> dict[str, bool]:
    """Of optimizers that count in their groups: whether weights are those of the run that goes on.

    Lookahead's slow weights come with its third update, and its count is among its defaults. Under
    ZeRO, DeepSpeed has it count for each group.
    """
    found, tags = {}, {}
    for stage, kind in ((0, 'lookahead'), (0, 'adan'), (1, 'adan'), (0, 'adafactor')):
        for updates in (2, 4):
            run = Run(OTHERS[kind], stage, f'{root}/{stage}{kind}{updates}')
            run.steps(updates)
            path = run.save(UPDATES)
            run.steps(4)
            tags[stage, kind, updates] = path, full_state(run.engine, [])
            run.close()
    for (source, kind, updates), (path, later) in tags.items():
        for stage in (0, 1) if kind == 'adan' else (0,):
            run = Run(OTHERS[kind], stage, '')
            run.steps(1)
            assert run.load(path) == ''
            run.steps(4)
            found[f'{source} {stage} {kind} {updates}'] = full_state(run.engine, []) == later
            run.close()
    return found
