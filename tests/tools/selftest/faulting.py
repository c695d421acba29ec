"""What ranks do in test_selftest.py: trials of the self-test with a fault put in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed.comm as dist
import torch

from internvl_ds import NativeScalerWithGradNormCount
from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.save import save_checkpoint
from internvl_ds.dist.rendezvous import rank
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.engine.initialize import initialize
from internvl_ds.tools.selftest import links, program, subject, tags, traffic
from internvl_ds.tools.selftest.row import Row

_CALL, _UPDATE = NativeScalerWithGradNormCount.__call__, ShardedEma.update
_AVERAGE = subject.DECAY


def _wrong_norm(scaler: Any, *args: Any, **kwargs: Any) -> Any:
    return _CALL(scaler, *args, **kwargs) * 1.001


def _skipped_clip(scaler: Any, loss: Any, optimizer: Any, clip: Any, *args: Any) -> Any:
    return _CALL(scaler, loss, optimizer, None, *args)


def _extra_read(scaler: Any, *args: Any, **kwargs: Any) -> Any:
    norm = _CALL(scaler, *args, **kwargs)
    float(norm)
    return norm


def _late_average(average: ShardedEma, model: Any = None) -> None:
    """Misses the first update."""
    if vars(average).setdefault('first', True):
        average.first = False  # type: ignore[attr-defined]
        return
    _UPDATE(average, model)


def _lost_group(config: Any, model: Any, optimizer: Any, json: Any) -> Any:
    del optimizer.param_groups[1]
    return initialize(config, model, optimizer, json)


def _swapped_shards(config: Any, epoch: int, *args: Any) -> str:
    """Saves, and gives each rank's optimizer state in the second tag the other's name."""
    tag = save_checkpoint(config, epoch, *args)
    async_save.wait()
    if rank() == 0 and epoch == 1:
        a, b = sorted(Path(tag).glob('*_optim_states.pt'))
        other = a.with_suffix('.other')
        a.rename(other)
        b.rename(a)
        other.rename(b)
    dist.barrier()
    return tag


def _stale_latest(folder: str) -> str:
    async_save.wait()
    dist.barrier()
    if rank() == 0:
        Path(folder, 'latest').write_text('ckpt_epoch_0')
    dist.barrier()
    return str(Path(folder, 'ckpt_epoch_1'))


def _slow_send(*args: Any, **kwargs: Any) -> Any:
    if rank() == 0:
        time.sleep(0.3)
    return dist.isend(*args, **kwargs).wait()


class _OfAnotherDevice(traffic.Traffic):
    """Takes the ranks' device for a GPU, and what they send lies on the CPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device('cuda'))


def _own_error() -> Row:
    if rank() == 1:
        raise ValueError('of its own')
    return Row('x', 'ok', '')


def _absent() -> Row:
    """Rank 1 does not come to the trial's end in time."""
    if rank() == 1:
        time.sleep(12)
    return Row('absent', 'ok', '')


@contextmanager
def _impatient() -> Iterator[None]:
    with mock.patch.object(program, 'LIMIT', 5):
        yield


def _patch(owner: Any, name: str, stand_in: Any) -> AbstractContextManager[Any]:
    return mock.patch.object(owner, name, stand_in)


def run_faults(folder: str) -> dict[str, list[str]]:
    """Fault -> verdict and text of the trial that must see it; '' names the trials without one."""
    scaler, root = NativeScalerWithGradNormCount, Path(folder)

    def updates() -> Row:
        return program.updates_row('fp32', (1,))

    def saved(name: str) -> Callable[[], Row]:
        return lambda: tags.tags_row(1, 3, root / name)

    def counted() -> Row:
        return traffic.traffic_row((1,))

    faults: list[tuple[str, Callable[[], Row], AbstractContextManager[Any]]] = [
        ('wrong norm', updates, _patch(scaler, '__call__', _wrong_norm)),
        ('skipped clip', updates, _patch(scaler, '__call__', _skipped_clip)),
        ('late average', updates, _patch(ShardedEma, 'update', _late_average)),
        ('lost group', updates, _patch(subject, 'initialize', _lost_group)),
        ('swapped shards', saved('swapped'), _patch(tags, 'save_checkpoint', _swapped_shards)),
        ('stale latest', saved('stale'), _patch(tags, 'auto_resume_helper', _stale_latest)),
        ('wrong device', counted, _patch(traffic, 'Traffic', _OfAnotherDevice)),
        ('extra read', counted, _patch(scaler, '__call__', _extra_read)),
        ('slow link', links.links_row, _patch(dist, 'send', _slow_send)),
        ('error of a rank', _own_error, nullcontext()),
        ('absent rank', _absent, _impatient()),
    ]
    results = {}
    for name, trial, patch in faults:
        with patch:
            goes_on, (row,) = program._agreed(name, trial)
        results[name] = [row.verdict, row.found, str(goes_on)]
    return results
