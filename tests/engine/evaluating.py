"""What ranks do in test_averaged_module.py."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from internvl_ds import NativeScalerWithGradNormCount, ShardedEma, save_checkpoint
from internvl_ds.dist.rendezvous import rank, world_size
from tests.engine.stepping import make_engine, masters, train_step
from tests.harness.calls import message_of
from tests.harness.model import batch, make_config, micro_batch, module_dtype, on_device

_log = logging.getLogger('evaluating')


class _Run:
    """An engine with an average, and updates whose halves can be told apart."""

    def __init__(self, stage: int, precision: str) -> None:
        self.engine, self.optimizer = make_engine(stage, precision, 2)
        self.scaler = NativeScalerWithGradNormCount()
        self.average = ShardedEma(self.engine, 0.5)
        self.dtype = module_dtype(precision)
        self.x = on_device(batch(99)[0].to(self.dtype))

    def update(self, step: int) -> None:
        train_step(self.engine, self.optimizer, self.scaler, step, 0.5, 2)
        self.average.update(self.engine if step % 2 else self.engine.module)

    def half(self, step: int, micro: int) -> float | None:
        """One of two micro-batches."""
        x, y = micro_batch(step, micro, 2, rank(), world_size())
        loss = nn.functional.cross_entropy(self.engine(x.to(self.dtype)).float(), y) / 2
        norm = self.scaler(loss, self.optimizer, 0.5, update_grad=micro == 1)
        return None if norm is None else float(norm)

    def expected(self) -> torch.Tensor:
        """The logits of the average, the proven way."""
        self.engine.eval()
        with torch.no_grad(), self.average.swapped_in():
            logits = self.engine(self.x)
        self.engine.train()
        return logits


def call_the_average(pairs: list[tuple[int, str]]) -> dict[str, Any]:
    """Calls ``.ema`` in the middle of a training, which a second run makes without it."""
    found = {}
    for stage, precision in pairs:
        run, other = _Run(stage, precision), _Run(stage, precision)
        for step in range(3):
            run.update(step)
            other.update(step)
        expected, module = run.expected(), run.engine.module
        module.norm.eval()  # as a frozen part is kept
        before = masters(run.engine)
        run.half(3, 0)
        called: list[Any] = [run.average.ema.eval()(run.x)]
        copies = len(run.average.ema._copies)
        with torch.no_grad():
            called.append(run.average.ema(run.x))
        with torch.inference_mode():
            called.append(run.average.ema(run.x))
            called.append(run.average.ema(run.x.clone()))
        with run.average.swapped_in():
            called.append(run.average.ema.forward(run.x))
            inside = {
                'save': message_of(lambda run=run: _save(run)),
                'step': message_of(lambda run=run: run.half(3, 1)),
                'update': message_of(run.average.update),
                'state': message_of(run.average.ema.state_dict),
                'load': message_of(lambda run=run: run.average.load_whole({}, '')),
            }
        modes = [module.training, module.stem.training, module.norm.training]
        module.norm.train()
        other.half(3, 0)
        same_masters = masters(run.engine) == before
        norms = run.half(3, 1), other.half(3, 1)
        freed = not run.average.ema._copies
        run.average.update(module)
        other.average.update()
        found[f'{stage} {precision}'] = {
            'equal': [torch.equal(logits, expected) for logits in called],
            'needs a gradient': any(logits.requires_grad for logits in called),
            'copies': copies > 0,
            'freed': freed,
            'modes': modes,
            'inside': inside,
            'same masters': same_masters,
            'norms': norms[0] == norms[1],
            'trains on': masters(run.engine) == masters(other.engine),
            'next average': torch.equal(run.average.ema(run.x), other.expected()),
            'autocast': _in_one_autocast(run, precision),
            'state': sorted(run.average.ema.state_dict()) == sorted(other.average.state_dict()),
        }
        run.engine.destroy()
        other.engine.destroy()
    return found


def _save(run: _Run) -> None:
    config = make_config('nowhere')
    save_checkpoint(config, 0, run.engine, 0.0, run.optimizer, None, run.scaler, _log)


def _in_one_autocast(run: _Run, precision: str) -> list[bool]:
    """Weights, average and weights again in one autocast, which caches what it casts."""
    if 'autocast' not in precision:
        return [True, True, True]
    expected = run.expected()
    run.engine.eval()
    with torch.autocast('cpu', torch.bfloat16):
        own = run.engine(run.x).detach()
        averaged = run.average.ema(run.x)
        again = run.engine(run.x).detach()
        with run.average.swapped_in():
            swapped = run.engine(run.x).detach()
    run.engine.train()
    return [
        torch.equal(own, again),
        torch.equal(averaged, expected) and torch.equal(swapped, expected),
        not torch.equal(own, averaged),
    ]
