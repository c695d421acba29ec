"""What ranks do in test_scaling.py and test_overflow.py."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.profiler import ProfilerActivity, profile

import internvl_ds
from internvl_ds import (
    NativeScalerWithGradNormCount,
    get_grad_norm,
    initialize,
    load_checkpoint,
    save_checkpoint,
)
from internvl_ds.checkpoint.formats.export import write_original
from internvl_ds.checkpoint.tag.discovery import newest
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.errors import ConfigError, GradientOverflow
from tests.engine.stepping import make_engine, masters, train_step
from tests.harness.model import (
    make_config,
    make_model,
    make_optimizer,
    micro_batch,
    precision_values,
    zero_json,
)

_log = logging.getLogger(__name__)
_READS = ('item', 'tolist', '__bool__', '__float__', '__int__', '__index__', 'cpu', 'numpy')


@contextmanager
def _our_reads() -> Iterator[list[str]]:
    """Lists the places of this package that read a tensor on the host."""
    package = str(Path(internvl_ds.__file__).parent)
    places: list[str] = []
    originals = {name: getattr(torch.Tensor, name) for name in _READS}

    def watched(name: str) -> Any:
        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code
            if caller.co_filename.startswith(package):
                places.append(f'{caller.co_filename}: {caller.co_name}')
            return originals[name](self, *args, **kwargs)

        return read

    for name in _READS:
        setattr(torch.Tensor, name, watched(name))
    try:
        yield places
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)


def counted(train: Any) -> dict[str, int]:
    """Collectives, host reads and waits for the device of a call."""
    accelerator, waits = get_accelerator(), []
    synchronize = accelerator.synchronize
    accelerator.synchronize = lambda *device: waits.append(device) or synchronize(*device)
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            train()
    finally:
        del accelerator.synchronize
    events = Counter(event.name for event in profiler.events())
    return {
        'collectives': sum(n for name, n in events.items() if name.startswith('c10d::')),
        'reads': events['aten::_local_scalar_dense'],
        'synchronisations': len(waits),
    }


def count_work(stages: list[int], precision: str) -> dict[str, Any]:
    """Collectives and host reads of one update: the bridge's beside a bare engine loop's."""
    results = {}
    for stage in stages:
        engine, optimizer = make_engine(stage, precision)
        scaler = NativeScalerWithGradNormCount()
        dtype = next(engine.module.parameters()).dtype
        for step in range(2):
            train_step(engine, optimizer, scaler, step, 0.5)
        x, y = micro_batch(2, 0, 1, rank(), world_size())

        def bridged() -> None:
            loss = nn.functional.cross_entropy(engine(x.to(dtype)).float(), y)
            scaler(loss, optimizer, 0.5)

        with _our_reads() as places:
            ours = counted(bridged)

        def bare() -> None:
            loss = nn.functional.cross_entropy(engine(x.to(dtype)).float(), y)
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()

        results[str(stage)] = {'bridge': ours, 'bare': counted(bare), 'places': places}
        engine.destroy()
    return results


def stop(
    root: str, stages: list[int], precision: str, fp16: dict[str, Any], limit: int
) -> list[dict[str, Any]]:
    """Overflows without end: what the error holds, what is saved, and what latest names."""
    return [_stop(f'{root}/{stage}', stage, precision, fp16, limit) for stage in stages]


def _stop(
    root: str, stage: int, precision: str, fp16: dict[str, Any], limit: int
) -> dict[str, Any]:
    engine, optimizer = make_engine(
        stage, precision, fp16=fp16, TRAIN__MAX_CONSECUTIVE_OVERFLOWS=limit
    )
    config = make_config(root)

    def save(best: str | None) -> str:
        return save_checkpoint(config, 3, engine, 50.0, optimizer, None, scaler, _log, best=best)

    scaler = NativeScalerWithGradNormCount(before_stop=lambda: save('overflow'))
    train_step(engine, optimizer, scaler, 0)
    good = save(None)
    before = masters(engine)
    try:
        for step in range(1, 40):
            train_step(engine, optimizer, scaler, step, poison=float('nan'))
        raise AssertionError('not stopped')
    except GradientOverflow as error:
        stopped = error
    found = newest(Path(root), {})
    resumed = make_config(MODEL__RESUME=f'{root}/ckpt_epoch_overflow')
    load_checkpoint(resumed, engine, optimizer, None, scaler, _log)
    assert found is not None
    return {
        'message': str(stopped),
        'losses': [str(x) for x in stopped.losses],
        'norms': [str(x) for x in stopped.norms],
        'scales': stopped.scales,
        'parameters': stopped.parameters,
        'updates': engine.global_steps,
        'unchanged': masters(engine) == before,
        'latest': str(found.path) == good,
        'diagnostic_epoch': resumed.TRAIN.START_EPOCH - 1,
    }


def accumulate(stages: list[int], cases: list[list[Any]]) -> list[list[dict[str, Any]]]:
    """At each stage updates of these numbers of micro-batches, where so many are agreed."""
    return [[_accumulate(stage, *case) for case in cases] for stage in stages]


def _accumulate(stage: int, groups: list[int], agreed: int) -> dict[str, Any]:
    engine, optimizer = make_engine(stage, 'fp32', agreed)
    scaler = NativeScalerWithGradNormCount()
    norms: list[float] = []
    try:
        for step, count in enumerate(groups):
            for micro in range(count):
                x, y = micro_batch(step, micro, 4, rank(), world_size())
                loss = nn.functional.cross_entropy(engine(x), y) / agreed
                norm = scaler(loss, optimizer, update_grad=micro == count - 1)
            norms.append(float(norm))
    except ConfigError as error:
        return {'error': str(error), 'norms': norms}
    return {'norms': norms, 'weights': masters(engine)}


def keep_scale(root: str, precision: str) -> dict[str, Any]:
    """Scale, growth counter and hysteresis through a save and loads into every stage."""
    fp16 = {'initial_scale_power': 10, 'hysteresis': 3, 'loss_scale_window': 100}
    results: dict[str, Any] = {}
    for stage in range(4):
        engine, optimizer = make_engine(stage, precision, fp16=fp16)
        scaler = NativeScalerWithGradNormCount()
        for step in range(9):  # 4 overflows lower the scale twice: 3 overflows, then 1
            bad = step in (1, 2, 3, 5)
            train_step(engine, optimizer, scaler, step, poison=float('inf') if bad else None)
        state = scaler.state_dict()
        config = make_config(f'{root}/{stage}')
        path = save_checkpoint(config, 0, engine, 0.0, optimizer, None, scaler, _log)
        without = save_checkpoint(config, 1, engine, 0.0, optimizer, None, None, _log, best='x')
        engine.destroy()
        single = Path(root, f'{stage}-{rank()}.pth')
        write_original(Path(path), single)
        for target in range(4):
            loaded = []
            for tag, used in (
                (path, NativeScalerWithGradNormCount()), (without, None),
                (str(single), NativeScalerWithGradNormCount()),
            ):  # fmt: skip
                engine, optimizer = make_engine(target, precision, fp16=fp16)
                resumed = make_config(MODEL__RESUME=tag)
                load_checkpoint(resumed, engine, optimizer, None, used, _log)
                scaler = used or NativeScalerWithGradNormCount()
                train_step(engine, optimizer, scaler, 9)
                loaded.append(scaler.state_dict())
                engine.destroy()
            results[f'{stage} -> {target}'] = loaded
        results[f'{stage}'] = state
    return results


def load_grad_scaler(precision: str) -> list[Any]:
    """A GradScaler's state into a scaler before its first call, and into one that has stepped."""
    other = torch.amp.GradScaler('cpu', init_scale=128.0, growth_interval=2000)
    other.scale(torch.ones(()))
    state = {**other.state_dict(), '_growth_tracker': 7}
    found = []
    for first in (True, False):
        engine, optimizer = make_engine(1, precision)
        scaler = NativeScalerWithGradNormCount()
        if not first:
            train_step(engine, optimizer, scaler, 0)
        scaler.load_state_dict(state)
        norm, _, _ = train_step(engine, optimizer, scaler, 1)
        scale = wrapper_of(engine).scale
        found.append([scaler.loss_scale, scale and scale.growth_tracker, float(norm)])
        other.load_state_dict(scaler.state_dict()) if scale else None  # torch takes ours as well
        engine.destroy()
    return found


def norms_of_parts(precision: str, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """get_grad_norm of every parameter by itself, with ZeRO settings that order or move them."""
    return [_norms_of_parts(precision, zero) for zero in settings]


def _norms_of_parts(precision: str, zero: dict[str, Any]) -> dict[str, Any]:
    model = make_model()
    json = {'zero_optimization': zero, 'zero_force_ds_cpu_optimizer': False}
    config = make_config(DATA__BATCH_SIZE=8, **precision_values(precision))
    engine, optimizer = initialize(config, model, make_optimizer(model), json)
    scaler = NativeScalerWithGradNormCount()
    train_step(engine, optimizer, scaler, 0)  # an old gradient is in the buffers from now on
    try:
        get_grad_norm(model.parameters())
        after = 'no error'
    except Exception as error:
        after = str(error)
    x, y = micro_batch(1, 0, 1, rank(), world_size())
    dtype = next(model.parameters()).dtype
    engine.backward(nn.functional.cross_entropy(engine(x.to(dtype)).float(), y))
    norms = {n: float(get_grad_norm(p)) for n, p in model.named_parameters()}
    engine.destroy()
    return {'norms': norms, 'after': after}


def poison(stages: list[int], precision: str, bad_loss: bool) -> list[list[str]]:
    """A nan in the gradient of one tensor, or in the loss, on rank 1 only: what the error names."""
    return [_poison(stage, precision, bad_loss) for stage in stages]


def _poison(stage: int, precision: str, bad_loss: bool) -> list[str]:
    engine, optimizer = make_engine(stage, precision, TRAIN__MAX_CONSECUTIVE_OVERFLOWS=1)
    scaler = NativeScalerWithGradNormCount()
    x, y = micro_batch(0, 0, 1, rank(), world_size())
    head = engine.module.head
    if rank() == 1 and not bad_loss:
        head.bias.register_hook(lambda grad: grad * float('nan'))
    loss = nn.functional.cross_entropy(engine(x.to(head.bias.dtype)).float(), y)
    if rank() == 1 and bad_loss:
        loss = loss * float('nan')
    try:
        scaler(loss, optimizer)
    except GradientOverflow as error:
        return [*error.parameters, str(error)]
    raise AssertionError('not stopped')


def accumulate_in_fp32(precision: str, stages: list[int]) -> dict[str, list[float]]:
    """Norms of updates whose micro-batches add up in float32."""
    found = {}
    for stage in stages:
        json = {**zero_json(stage), 'data_types': {'grad_accum_dtype': 'fp32'}}
        config = make_config(
            DATA__BATCH_SIZE=4, TRAIN__ACCUMULATION_STEPS=2, **precision_values(precision)
        )
        model = make_model()
        engine, optimizer = initialize(config, model, make_optimizer(model), json)
        scaler = NativeScalerWithGradNormCount()
        steps = [train_step(engine, optimizer, scaler, step, 0.5, 2) for step in range(6)]
        found[str(stage)] = [float(norm) for norm, _, _ in steps]
        engine.destroy()
    return found


def after_autocast() -> dict[str, Any]:
    """Norms of bf16 engines of stages 1 to 3, before and after one of torch autocast float16."""

    def norms() -> tuple[list[list[float]], list[Any]]:
        found, scales = [], []
        for stage in (1, 2, 3):
            engine, optimizer = make_engine(stage, 'bf16')
            scaler = NativeScalerWithGradNormCount()
            found.append(
                [float(train_step(engine, optimizer, scaler, s, 0.5)[0]) for s in range(2)]
            )
            scales.append(wrapper_of(engine).scale)
            engine.destroy()
        return found, scales

    before, _ = norms()
    engine, optimizer = make_engine(1, 'autocast_fp16')
    train_step(engine, optimizer, NativeScalerWithGradNormCount(), 0, 0.5)
    after, scales = norms()
    return {'before': before, 'after': after, 'scales': scales}
