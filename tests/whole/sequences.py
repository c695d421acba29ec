"""What ranks do in test_sequences.py: one segment of each of many sequences, an engine each."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from yacs.config import CfgNode

from internvl_ds import (
    NativeScalerWithGradNormCount,
    auto_resume_helper,
    initialize,
    load_checkpoint,
    load_ema_checkpoint,
    load_pretrained,
    save_checkpoint,
)
from internvl_ds.checkpoint import async_save
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.errors import InternvlDsError
from tests.harness.model import micro_batch, module_dtype, precision_values
from tests.harness.sequence_model import CLIP, make_client, make_net, make_scheduler, toggle
from tests.harness.sequences import shows_state
from tests.harness.whole_state import whole_state

logger = logging.getLogger('test')


def make_config(output: str, orders: dict[str, Any]) -> CfgNode:
    """As of a script that has no other keys, which takes less time than a whole tree."""
    newest, best, every, steps = orders['keep']
    tree = {
        'OUTPUT': output,
        'SAVE_CKPT_NUM': newest,
        'DATA': {'BATCH_SIZE': 16 // orders['accumulation'] // world_size()},
        'MODEL': {'RESUME': '', 'PRETRAINED': ''},
        'TRAIN': {'START_EPOCH': 0, 'ACCUMULATION_STEPS': orders['accumulation']},
        'CHECKPOINT': {
            'ASYNC': orders['background'],
            'ASYNC_COPY': 'overlap',
            'FROZEN': 'once' if orders['seed'] % 4 else 'keep',
            'KEEP_BEST': best,
            'KEEP_EVERY': every,
            'KEEP_STEPS': steps,
            'RENDEZVOUS_TIMEOUT': 30,
        },
        **precision_values(orders['precision']),
    }
    return CfgNode(tree)


class Position:
    """What `save_checkpoint` keeps of the loop: the updates of the epoch that are done."""

    def __init__(self) -> None:
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {'done': self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state['done']


class Run:
    """A segment under way; its operations are methods."""

    def __init__(self, orders: dict[str, Any], kind: str, output: str) -> None:
        self.orders = orders
        self.config = make_config(output, orders)
        self.dtype = module_dtype(orders['precision'])
        self.net = make_net(orders['seed'], orders['trained'])
        if orders['begin'][:1] == ['pretrained']:
            self.config.MODEL.PRETRAINED = f'{output}/{orders["begin"][1]}'
            load_pretrained(self.config, self.net, logger)
        client = make_client(
            kind, {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        )
        self.scheduler = make_scheduler(client)
        json = {
            'zero_optimization': {'stage': orders['stage'], **orders['zero']},
            'zero_force_ds_cpu_optimizer': False,
        }
        self.engine, self.optimizer = initialize(
            self.config, self.net, client, json, lr_scheduler=self.scheduler
        )
        self.scaler, self.position = NativeScalerWithGradNormCount(), Position()
        self.ema: ShardedEma | None = None
        self.accuracy = 0.0

    def begin(self) -> dict[str, Any]:
        """What comes before the average is made."""
        seen = self.attempt(self.orders['begin'])
        if self.orders['decay'] is not None:
            self.ema = ShardedEma(self.engine, self.orders['decay'], self.orders['warmup'])
        seen = self.load_average(seen)
        return self.look(seen) if self.orders['begin'] else seen

    def do(self, words: list[Any], last: bool) -> dict[str, Any]:
        """An operation of the sequence."""
        seen = self.load_average(self.attempt(words))
        return self.look(seen) if shows_state(words, seen.get('error'), last) else seen

    def attempt(self, words: list[Any]) -> dict[str, Any]:
        try:
            return getattr(self, words[0])(*words[1:]) if words else {}
        except InternvlDsError as error:
            return {'error': type(error).__name__, 'said': str(error)}

    def pretrained(self, tag: str) -> dict[str, Any]:
        return {}  # before the engine was made

    def train(self, updates: int) -> dict[str, Any]:
        norms, accumulation = [], self.orders['accumulation']
        torch.rand(1)  # so that every save meets another state of the generator
        for _ in range(updates):
            step = self.engine.global_steps
            for micro in range(accumulation):
                x, y = micro_batch(step, micro, accumulation, rank(), world_size())
                logits = self.engine(x.to(self.dtype)).float()
                loss = nn.functional.cross_entropy(logits, y) / accumulation
                last = micro == accumulation - 1
                norm = self.scaler(loss, self.optimizer, CLIP, update_grad=last)
            norms.append(float(norm))
            self.position.done += 1
            if self.ema is not None:
                self.ema.update()
        return {'norms': norms}

    def toggle(self, part: str, on: bool) -> dict[str, Any]:
        toggle(self.net, part, on)
        return {}

    def save(self, how: str, accuracy: float) -> dict[str, Any]:
        self.accuracy = max(self.accuracy, accuracy)
        epoch, done = self.config.TRAIN.START_EPOCH, self.position.done
        step = done if how == 'step' and done else None
        self.position.done = step or 0
        path = save_checkpoint(
            self.config, epoch, self.engine, self.accuracy, self.optimizer, self.scheduler,
            self.scaler, logger, model_ema=self.ema, max_accuracy_ema=self.accuracy / 2,
            best='best' if how == 'best' else None, step=step, loop=self.position,
        )  # fmt: skip
        if how == 'best':
            self.position.done = done
        elif step is None:
            self.config.TRAIN.START_EPOCH = epoch + 1
        return {'saved': Path(path).name, 'rng': _digest(torch.get_rng_state())}

    def resume(self, how: str, name: str) -> dict[str, Any]:
        output = self.config.OUTPUT
        taken = f'{output}/{name}' if name else output
        if how == 'auto':
            taken = auto_resume_helper(output) or ''
        self.config.MODEL.RESUME, self.config.TRAIN.AUTO_RESUME = taken, how != 'rewind'
        self.accuracy = load_checkpoint(
            self.config, self.engine, self.optimizer, self.scheduler, self.scaler, logger,
            loop=self.position,
        )  # fmt: skip
        returned = [self.accuracy, 0.0, self.config.TRAIN.START_EPOCH]
        return {'returned': returned, 'rng': _digest(torch.get_rng_state())}

    def load_average(self, seen: dict[str, Any]) -> dict[str, Any]:
        """After a load, whose average comes from where the weights did."""
        if 'returned' in seen and self.ema is not None:
            seen['returned'][1] = load_ema_checkpoint(self.config, self.ema, logger)
        return seen

    def look(self, seen: dict[str, Any]) -> dict[str, Any]:
        if not self.orders['background']:
            seen.update(tags_in(Path(self.config.OUTPUT)))
        seen['state'] = self.state()
        return seen

    def state(self) -> dict[str, Any]:
        """All state, by name, whole on every rank."""
        engine, named = self.engine, dict(self.net.named_parameters())
        masters, moments = whole_state(engine)
        gathered = deepspeed.zero.GatheredParameters(
            list(named.values()), enabled=engine.zero_optimization_stage() == 3
        )
        with gathered:
            weights = {n: p.detach().clone() for n, p in named.items()}
        average = None
        if self.ema is not None:
            average = {
                'of': [self.ema.decay, self.ema.num_updates, self.ema.warmup is not None],
                'tensors': {n: t.clone() for n, t in self.ema.whole_tensors()},
            }
        groups = engine.basic_optimizer.param_groups
        return {
            'masters': masters,
            'moments': moments,
            'frozen': {n: w for n, w in weights.items() if n not in masters},
            'stage': engine.zero_optimization_stage(),
            'rounded': {n: m.to(self.dtype) for n, m in masters.items()},
            'other': [n for n, m in masters.items() if not self.is_of(weights[n], m)],
            'buffers': {n: b.clone() for n, b in self.net.named_buffers()},
            'requires': {n: p.requires_grad for n, p in named.items()},
            'lrs': {name: group['lr'] for group in groups for name in group['param_names']},
            'ema': average,
            'counts': [engine.global_steps - engine.skipped_steps, self.position.done],
        }

    def is_of(self, weight: torch.Tensor, master: torch.Tensor) -> bool:
        """Whether what the module computes with is a master, rounded to nearest."""
        if torch.equal(weight, master.to(self.dtype)):
            return True
        # Under autocast stage 3 gathers what is small in bf16, and keeps it until the next step.
        in_autocast = 'autocast' in self.orders['precision'] and self.orders['stage'] == 3
        return in_autocast and torch.equal(weight, master.bfloat16().float())


def tags_in(output: Path) -> dict[str, Any]:
    latest = output / 'latest'
    return {
        'tags': sorted(path.parent.name for path in output.glob('*/manifest.json')),
        'latest': latest.read_text() if latest.exists() else None,
    }


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


def run_segments(folder: str, work: list[Any], states: str) -> list[Any]:
    """Runs segments one after another; each rank leaves the states that it saw in a file.

    Args:
        folder: holds an output directory for each sequence.
        work: (number of the sequence, its optimizer, `Segment.orders`) of each.
        states: the beginning of the files' names.

    Returns:
        For each, what was seen after each operation, without states; and at the end.
    """
    found, kept = [], []
    for number, kind, orders in work:
        print(f'sequence {number}', flush=True)  # of a rank that fails, the last line says which
        run = Run(orders, kind, f'{folder}/{number}')
        seen = [run.begin()]
        for index, words in enumerate(orders['operations'], 1):
            print(f'  {words}', flush=True)
            seen.append(run.do(words, index == len(orders['operations'])))
        async_save.wait()
        seen.append(tags_in(Path(run.config.OUTPUT)))
        run.engine.destroy()
        kept.append([look.pop('state', None) for look in seen])
        found.append(seen)
    torch.save(kept, f'{states}-{rank()}.pt')
    return found
