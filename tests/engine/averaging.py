"""What ranks do in test_ema.py and test_bench.py about the sharded average."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.utils import ModelEmaV3

from internvl_ds import (
    NativeScalerWithGradNormCount,
    load_checkpoint,
    load_ema_checkpoint,
    save_checkpoint,
)
from internvl_ds.checkpoint.formats.export import write_safetensors
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from tests.engine.scaling import counted
from tests.engine.stepping import make_engine, masters, train_step
from tests.harness.model import batch, make_config, make_model, module_dtype, on_device

_log = logging.getLogger('averaging')
_DECAY = 0.97


def follow_timm(stages: list[int], precision: str, updates: int) -> dict[str, Any]:
    """The gathered average beside timm's, kept unsharded on the fp32 masters."""
    results = {}
    for stage in stages:
        fp16 = {'initial_scale_power': 24} if 'fp16' in precision else None  # skips a few
        engine, optimizer = make_engine(stage, precision, 2, fp16)
        plain = make_model()
        # timm averages a tied weight once for each of its names
        plain.again.weight = torch.nn.Parameter(plain.tied.weight.detach().clone())
        _copy(engine, plain)
        ema = ShardedEma(engine, _DECAY, warmup=True)
        timms = ModelEmaV3(plain, decay=_DECAY, use_warmup=True)
        scaler = NativeScalerWithGradNormCount()
        applied = 0
        for step in range(updates):
            train_step(engine, optimizer, _EachCall(scaler, ema), step, 0.5, 2)
            if not scaler.step_was_skipped:
                applied += 1
                _copy(engine, plain)
                timms.update(plain, step=applied)
        state, wanted = ema.state_dict(), timms.module.state_dict()
        results[str(stage)] = {
            'keys': list(state) == list(wanted),
            'off': max(float((state[k] - wanted[k]).abs().max()) for k in wanted),
            'updates': [ema.num_updates, applied],
        }
        engine.destroy()
    return results


class _EachCall:
    """Updates the average after every call, on a boundary or not."""

    def __init__(self, scaler: Any, ema: ShardedEma) -> None:
        self._scaler, self._ema = scaler, ema

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        norm = self._scaler(*args, **kwargs)
        self._ema.update()
        return norm


def _copy(engine: Any, plain: torch.nn.Module) -> None:
    """The engine's fp32 masters, and buffers, into a plain module."""
    state = plain.state_dict()
    for name, value in masters(engine).items():
        state[name].copy_(torch.tensor(value).view(state[name].shape))
    for name, buffer in engine.module.named_buffers():
        state[name].copy_(buffer)
    low = next(engine.module.parameters()).dtype
    for name in ('frozen.weight', 'frozen.bias'):
        state[name].copy_(state[name].to(low))
    state['again.weight'].copy_(state['tied.weight'])


def count_update(stages: list[int], precision: str) -> dict[str, Any]:
    """Collectives and host reads of one update of the average."""
    found = {}
    for stage in stages:
        engine, optimizer = make_engine(stage, precision)
        ema, scaler = ShardedEma(engine, _DECAY, warmup=True), NativeScalerWithGradNormCount()
        for step in range(2):
            train_step(engine, optimizer, scaler, step)
            ema.update()
        train_step(engine, optimizer, scaler, 2)
        found[str(stage)] = counted(ema.update)
        engine.destroy()
    return found


def go_on(root: str, stage: int, resume: str | None, save_as: int | None) -> dict[str, Any]:
    """Loads or starts, trains a little where nothing is loaded, saves; the whole average.

    Args:
        resume: the tag to load; None to train from the start.
        save_as: the epoch to save; None for none.
    """
    engine, optimizer = make_engine(stage, 'fp32')
    ema, scaler = ShardedEma(engine, _DECAY, warmup=True), NativeScalerWithGradNormCount()
    config = make_config(root, MODEL__RESUME=resume or '', SAVE_CKPT_NUM=0)
    if resume:
        ema = ShardedEma(engine, 0.5)
        load_checkpoint(config, engine, optimizer, None, scaler, _log)
        load_ema_checkpoint(config, ema, _log)
    else:
        for step in range(4):
            train_step(engine, optimizer, scaler, step)
            ema.update()
    path = None
    if save_as is not None:
        path = save_checkpoint(
            config, save_as, engine, 0.0, optimizer, None, scaler, _log, model_ema=ema
        )
    state = {name: tensor.flatten().tolist() for name, tensor in ema.state_dict().items()}
    return {'path': path, 'state': state, 'of': [ema.decay, ema.num_updates, str(ema.warmup)]}


def evaluate_export(root: str, stages: list[int], precision: str) -> dict[str, Any]:
    """Logits with the average in place, and those of a plain model from the exported average."""
    found = {}
    x = on_device(batch(99)[0])
    for stage in stages:
        engine, optimizer = make_engine(stage, precision)
        ema, scaler = ShardedEma(engine, 0.5, warmup=True), NativeScalerWithGradNormCount()
        for step in range(4):
            train_step(engine, optimizer, scaler, step)
            ema.update()
        config = make_config(f'{root}/{stage}')
        tag = save_checkpoint(config, 0, engine, 0.0, optimizer, None, scaler, _log, model_ema=ema)
        target = Path(root, f'{stage}-{rank()}.safetensors')
        write_safetensors(Path(tag), target, torch.float32, ema=True, largest=1 << 30)
        plain = make_model(5).eval().to(engine.device, module_dtype(precision))
        plain.load_state_dict(safetensors.torch.load_file(target))
        engine.eval()
        given = x.to(module_dtype(precision))
        with torch.no_grad(), ema.swapped_in(engine):
            inside = engine(given)
        with torch.no_grad():
            after, outside = engine(given), plain(given)
        found[str(stage)] = [torch.equal(inside, outside), not torch.equal(inside, after)]
        engine.destroy()
    assert world_size() > 1
    return found
