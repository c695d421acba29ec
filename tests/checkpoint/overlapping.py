"""What ranks do in test_overlap.py: they go on while a slow copy of a save has just begun."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import distributed, nn

from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.copying import copies, snapshot
from internvl_ds.checkpoint.tag.manifest import Identity, file_rank
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.registry import wrapper_of
from tests.harness.calls import message_of
from tests.harness.model import micro_batch
from tests.harness.saving import ACCUMULATION, Run

_PAUSE = 0.002
_may_copy = threading.Event()


def _slow_down() -> None:
    """Small pieces, and a pause before each: all of the small model's state takes half a second."""
    snapshot._SMALL, copies._PIECE = 0, 256
    _may_copy.set()
    copy = copies.Copies._copy

    def pause_and_copy(self: Any, source: torch.Tensor, target: torch.Tensor) -> None:
        time.sleep(_PAUSE)
        _may_copy.wait()
        copy(self, source, target)

    copies.Copies._copy = pause_and_copy  # type: ignore[method-assign]


def _micro_step(run: Run, step: int, micro: int, factor: float = 1.0) -> None:
    x, y = micro_batch(step, micro, ACCUMULATION, rank(), world_size())
    loss = nn.functional.cross_entropy(run.engine(x.to(run.dtype)).float(), y) / ACCUMULATION
    run.scaler(loss * factor, run.optimizer, 0.5, update_grad=micro == ACCUMULATION - 1)


def _skip(run: Run) -> None:
    """A skipped update, then one that is applied."""
    for micro in range(ACCUMULATION):
        _micro_step(run, 7, micro, float('inf'))
    assert run.scaler.step_was_skipped
    run.steps(8, 9)


def _fail(run: Run) -> None:
    """An error in the middle of a forward pass, which the script catches, and goes on."""

    def refuse(*_: Any) -> None:
        raise ValueError('of the script')

    hook = run.engine.module.body.register_forward_pre_hook(refuse)
    with contextlib.suppress(ValueError):
        run.steps(9, 10)
    hook.remove()
    run.steps(9, 10)


def _evaluate(run: Run) -> None:
    """With the averaged weights, each way."""
    run.logits()
    run.ema.ema(micro_batch(5, 0, 1, 0, 1)[0].to(run.dtype))
    with run.ema.swapped_in():
        run.logits()


def _plain_step(run: Run) -> None:
    """An update without the bridge."""
    for micro in range(ACCUMULATION):
        x, y = micro_batch(11, micro, ACCUMULATION, rank(), world_size())
        loss = nn.functional.cross_entropy(run.engine(x.to(run.dtype)).float(), y)
        run.engine.backward(loss)
        run.engine.step()


def _update_beside(run: Run) -> None:
    """At a byte a second nothing would be written for an hour; who waits for it ends that."""
    run.steps(3, 4)
    assert async_save.is_running()


AFTER: dict[str, Callable[[Run], Any]] = {
    'updates': lambda run: run.steps(3, 5),
    'an update of the average': lambda run: run.ema.update(),
    'an evaluation': _evaluate,
    'a skipped update': _skip,
    'an error': _fail,
    'a plain step': _plain_step,
    'another save': lambda run: [run.save(0, best='other'), run.steps(5, 6)],
    'a load': lambda run: run.load(f'{run.config.OUTPUT}/ckpt_epoch_start'),
}


def go_on(root: str, cases: list[list[Any]]) -> dict[str, Any]:
    """Each (stage, precision, names of `AFTER`): what of the tag is not as a synchronous save's.

    'unguarded' is the same where no one waits for the copy.
    """
    _slow_down()
    found: dict[str, Any] = {}
    for stage, precision, names in cases:
        run = Run(stage, precision, f'{root}/{stage}-{precision}', SAVE_CKPT_NUM=0)
        report = found[f'{stage} {precision}'] = {}
        run.steps(0, 2)
        run.save(0, best='start')
        for name in names:
            report[name] = _differences(run, AFTER[name])
        wrapper = wrapper_of(run.engine)
        _set(run, ASYNC_MEMORY=1e-6)
        report['no memory'] = _differences(run, AFTER['updates'])
        _set(run, ASYNC_MEMORY=0.0, ASYNC_RATE=1e-6)
        report['a slow rate'] = _differences(run, _update_beside)
        _set(run, ASYNC_RATE=0.0)
        _micro_step(run, 12, 0)  # and the other half of the update after the save
        report['half an update'] = _differences(run, lambda run: _micro_step(run, 12, 1))

        def forget_to_wait(run: Run, wrapper: Any = wrapper) -> None:
            wrapper.before_write = lambda: None
            _may_copy.clear()
            run.steps(13, 15)
            _may_copy.set()

        report['unguarded'] = bool(_differences(run, forget_to_wait))
        run.close()
    return found


def _set(run: Run, **options: Any) -> None:
    run.config = run.config.clone()
    run.config.defrost()
    for name, value in options.items():
        run.config.CHECKPOINT[name] = value


def _differences(run: Run, action: Callable[[Run], Any]) -> list[str]:
    """Saves twice at one moment, the second time with ``action`` before it is copied."""
    _set(run, ASYNC=False)
    right = run.save(0, best='right')
    _set(run, ASYNC=True, ASYNC_COPY='overlap')
    path = run.save(0, best='copied')
    error = message_of(lambda: action(run))
    if error != 'no error':
        return [error]
    error = message_of(async_save.wait)
    distributed.barrier()
    return [error] if error != 'no error' else differences(Path(right), Path(path))


def differences(right: Path, other: Path) -> list[str]:
    """Names of what is not the same, bit for bit, in this rank's files of two tags."""
    names = {p.name for p in (*right.iterdir(), *other.iterdir()) if file_rank(p.name) == rank()}
    found = []
    for name in sorted(names - {'manifest.json'}):
        if not ((right / name).is_file() and (other / name).is_file()):
            found.append(f'{name} is missing')
        elif name.endswith(('.pt', '.safetensors', '.json')):
            found += _of_trees(_read(right / name), _read(other / name), name)
    return found


def _read(path: Path) -> Any:
    if path.suffix == '.json':
        return json.loads(path.read_text())
    if path.suffix == '.safetensors':
        return load_file(path)
    return torch.load(path, weights_only=False)


def _of_trees(a: Any, b: Any, where: str) -> list[str]:
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f'{where}: {sorted(map(str, a.keys() ^ b.keys()))}']
        keys = [key for key in a if key not in (Identity.KEY, 'config')]
        return [d for key in keys for d in _of_trees(a[key], b[key], f'{where}/{key}')]
    if isinstance(a, list | tuple):
        parts = [_of_trees(x, y, f'{where}/{i}') for i, (x, y) in enumerate(zip(a, b, strict=True))]
        return functools.reduce(list.__add__, parts, [])
    if hasattr(a, '__dict__'):
        return _of_trees(vars(a), vars(b), where)
    return [] if a == b else [f'{where}: {a} {b}']
