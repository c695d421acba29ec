"""A ViT's update through the bridge beside the bare engine's, and its memory beside the plan's."""

from __future__ import annotations

import random
import statistics
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from yacs.config import CfgNode

from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.tree import default_config, merge_opts
from internvl_ds.dist.rendezvous import exchange, world_size
from internvl_ds.engine.grad_scaler import NativeScalerWithGradNormCount
from internvl_ds.engine.initialize import initialize
from internvl_ds.engine.registry import wrapper_of
from internvl_ds.tools.plan.memory_planner import MemoryPlanner
from internvl_ds.tools.selftest.links import seconds_of
from internvl_ds.tools.selftest.row import OK, SLOW, WRONG, Row
from internvl_ds.tools.selftest.subject import CLIP, LIMIT, bare_update, is_supported
from internvl_ds.tools.text import human_size
from internvl_ds.train.model import build_model, input_dtype
from internvl_ds.train.optim import build_optimizer

_STAGE, _CLASSES, _ROUNDS = 1, 1000, 9
_SHARED = f'MODEL.TYPE timm MODEL.NUM_CLASSES {_CLASSES} MODEL.DROP_PATH_RATE 0.0 '
_ON_CPU = 'MODEL.NAME vit_tiny_patch16_224 MODEL.KWARGS.depth 4 DATA.IMG_SIZE 64 DATA.BATCH_SIZE 8'
_ON_DEVICE = 'MODEL.NAME vit_base_patch16_224 DATA.IMG_SIZE 224 DATA.BATCH_SIZE 64'
# It is slow where it takes this much longer in all pairs but one: other work on a host makes single
# ones of any size.
_MOST = 1.10
# Of what is planned, how much may be allocated: states alone, on a CPU, and a device's whole peak.
_PLAN = {True: 0.05, False: 0.25}


def pace_rows() -> tuple[Row, Row]:
    """Times and measures one engine. Collective: every rank calls it."""
    device = get_accelerator().device_name()
    on_cpu = device == 'cpu'
    config = default_config()
    merge_opts(config, (_SHARED + (_ON_CPU if on_cpu else _ON_DEVICE)).split())
    half = is_supported('bf16') and not on_cpu
    level = ['O2', 'AMP_TYPE', 'bfloat16'] if half else ['O0']
    merge_opts(config, ['AMP_OPT_LEVEL', *level, 'OUTPUT', '', 'COMM.TIMEOUT', str(LIMIT)])
    json = {'zero_optimization': {'stage': _STAGE}}
    model = build_model(config)
    engine, optimizer = initialize(config, model, build_optimizer(config, model, 1e-5), json)
    rows = _pace(engine, optimizer, config), _memory(engine, config, json, on_cpu)
    engine.destroy()
    return rows


def _pace(engine: Any, optimizer: Any, config: CfgNode) -> Row:
    size, images = config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE
    x = torch.randn(images, 3, size, size, device=engine.device, dtype=input_dtype(engine.module))
    y = torch.randint(_CLASSES, (images,), device=engine.device)
    scaler = NativeScalerWithGradNormCount()

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(engine(x).float(), y)

    def bridge() -> None:
        scaler(loss(), optimizer, CLIP, engine.parameters())

    def bare() -> None:
        bare_update(engine, loss())

    updates = 1 if engine.device.type == 'cpu' else 10
    order = random.Random(0)  # on all ranks alike
    ratios, seconds = [], []
    for index in range(_ROUNDS + 1):
        first, second = order.sample([bridge, bare], 2)
        took = {way: seconds_of(way, updates) for way in (first, second)}
        if index:  # the first pair warms up
            ratios.append(took[bridge] / took[bare])
            seconds.append(took[bridge] / updates)
    middle, update = statistics.median(ratios), statistics.median(seconds)
    found = (
        f'bridge / bare engine {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f}), {_ROUNDS} '
        f'pairs of {config.MODEL.NAME}, {images / update:.0f} images/s a rank'
    )
    figures = {'ratio': middle, 'images_per_second': images / update}
    return Row('pace', SLOW if sorted(ratios)[1] > _MOST else OK, found, figures)


def _memory(engine: Any, config: CfgNode, json: dict[str, Any], on_cpu: bool) -> Row:
    planner = MemoryPlanner(config, gpu=not on_cpu)
    need = planner.need(
        ds.resolve_or_raise(json, config, world_size()), world_size(), recompute=False
    )
    planned = need.static.weights + need.static.optimizer if on_cpu else need.device
    measured = _held(engine) if on_cpu else get_accelerator().max_memory_allocated()
    most = max(exchange('selftest memory', int(measured), LIMIT))
    ratio, allowed = planned / most, _PLAN[on_cpu]
    what = 'weights and optimizer' if on_cpu else 'the most on the device'
    found = (
        f'{what}: {human_size(planned)} planned, {human_size(most)} allocated, ratio {ratio:.3f} '
        f'(allowed {1 - allowed:g} to {1 + allowed:g})'
    )
    return Row('plan', OK if abs(ratio - 1) <= allowed else WRONG, found, {'ratio': ratio})


def _held(engine: Any) -> int:
    """Bytes of the weights, masters and optimizer state that this rank keeps."""
    wrapper = wrapper_of(engine)
    state = [v for values in wrapper.client.state.values() for v in values.values()]
    tensors = [*engine.module.parameters(), *engine.module.buffers(), *wrapper.masters().values()]
    tensors += [value for value in state if isinstance(value, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
