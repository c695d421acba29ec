"""Ranks that come to named places, and one of them stays at the place where a fault is to meet it.

A place is a meeting, a call to the store inside it, a collective, or the end. Which there are is
found by going through the stories with nobody staying: a meeting that is new has its place at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.nn.functional import cross_entropy
from yacs.config import CfgNode

from internvl_ds import (
    NativeScalerWithGradNormCount,
    auto_resume_helper,
    initialize,
    load_ema_checkpoint,
    load_pretrained,
)
from internvl_ds.checkpoint.mirror.uploads import uploads
from internvl_ds.checkpoint.sources import downloads
from internvl_ds.dist import preemption as preemption_module
from internvl_ds.dist import rendezvous as meetings
from internvl_ds.dist.preemption import Preemption
from internvl_ds.dist.process_group import init_distributed, leave, shutdown
from internvl_ds.dist.store_client import StoreClient
from internvl_ds.train import __main__ as program
from internvl_ds.train import evaluate as train_evaluate
from tests.checkpoint.formats import originals
from tests.harness import elastic
from tests.harness.model import batch, make_config, make_model, on_device, zero_json
from tests.harness.saving import Run, logger
from tests.harness.training import brightness, small_config
from tests.train.models import tiny
from tests.zero.passes import leaving_out

COLLECTIVES = (
    'all_gather', 'all_gather_into_tensor', 'all_gather_object', 'all_reduce', 'barrier',
    'broadcast', 'broadcast_object_list', 'gather', 'reduce', 'reduce_scatter_tensor',
)  # fmt: skip

# Seconds that a rank stays at a place if nobody comes to inflict anything.
_STAY = 300.0

# What this thread is in: the name of a meeting, and how often it has called the store there.
_inside = threading.local()

BEFORE_JOINING, JOINING, TORCH_JOINS = 'before joining', 'connected to the store', 'torch joins'
LAST = 'last meeting'


class Places:
    """Notes the places that this rank comes to; stays at one until it is told to go on."""

    def __init__(self, folder: Path, own: int, stays_at: str | None) -> None:
        """Args:
        folder: gets ``places_RANK``, a line for each, and ``here`` from the rank that stays.
        own: this rank.
        stays_at: the place where this rank stays; None for nowhere.
        """
        self._folder, self._own, self._stays_at = folder, own, stays_at
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def come(self, name: str) -> None:
        """This rank is at a place, for the n-th time."""
        with self._lock:
            self._counts[name] += 1
            place = f'{name} #{self._counts[name]}'
            with (self._folder / f'places_{self._own}').open('a') as file:
                file.write(place + '\n')
        if place != self._stays_at:
            return
        (self._folder / 'here.tmp').write_text(str(os.getpid()))
        (self._folder / 'here.tmp').rename(self._folder / 'here')
        deadline = time.monotonic() + _STAY
        while not (self._folder / 'go').exists() and time.monotonic() < deadline:
            time.sleep(0.02)


def install(places: Places) -> None:
    """Has every meeting, store call and collective of this process pass by ``places``."""
    for name in COLLECTIVES:
        _wrap_everywhere(getattr(dist, name), functools.partial(_collective, places, name), 'torch')
    _wrap_everywhere(meetings._exchange, functools.partial(_meeting, places), 'internvl_ds')
    last = functools.partial(_in_meeting, places, LAST)
    _wrap_everywhere(meetings.part_from, last, 'internvl_ds')
    StoreClient.post = _store_call(places, StoreClient.post)
    _wrap_everywhere(train_evaluate.evaluate, functools.partial(_evaluation, places), 'internvl_ds')
    joined = dist.TCPStore.__init__

    def join(self: Any, *args: Any, **kwargs: Any) -> None:
        joined(self, *args, **kwargs)
        places.come(JOINING)

    dist.TCPStore.__init__ = join
    making = distributed_c10d._new_process_group_helper
    _wrap_everywhere(making, functools.partial(_group, places), 'torch')


def _wrap_everywhere(original: Any, around: Callable[..., Any], package: str) -> None:
    """Puts ``around(original, ...)`` wherever a module of the package has the function."""
    wrapped = functools.wraps(original)(functools.partial(around, original))
    for name, module in list(sys.modules.items()):
        if name.split('.')[0] == package and module is not None:
            for key, value in list(vars(module).items()):
                if value is original:
                    setattr(module, key, wrapped)


def _group(places: Places, original: Any, *args: Any, **kwargs: Any) -> Any:
    places.come('torch makes a group' if dist.is_initialized() else TORCH_JOINS)
    return original(*args, **kwargs)


def _collective(places: Places, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    places.come(f'collective {name}')
    return original(*args, **kwargs)


def _evaluation(places: Places, original: Any, *args: Any, **kwargs: Any) -> Any:
    places.come('evaluation')
    return original(*args, **kwargs)


def _meeting(places: Places, original: Any, peers: Any, what: str, *args: Any) -> Any:
    thread = threading.current_thread()
    behind = '' if thread is threading.main_thread() else f', {thread.name.split()[0]} thread'
    return _in_meeting(places, f'{what}{behind}', original, peers, what, *args)


def _in_meeting(places: Places, name: str, original: Any, *args: Any) -> Any:
    places.come(name)
    _inside.name, _inside.calls = name, 0
    try:
        return original(*args)
    finally:
        _inside.name = None


def _store_call(places: Places, original: Any) -> Any:
    def post(self: Any, *args: Any) -> Any:
        name = getattr(_inside, 'name', None)
        if name is not None:
            _inside.calls += 1
            if _inside.calls == 2:  # it has brought what it brings
                places.come(f'{name}, inside')
        return original(self, *args)

    return post


# What ranks do. ``shared`` holds what the stories `save` and `make_file` left in a normal run.


def join(shared: Path, limits: dict[str, Any]) -> None:
    """A script that only joins, averages a number and leaves."""
    dist.all_reduce(torch.ones(1))
    shutdown()


def save(shared: Path, limits: dict[str, Any]) -> None:
    """A script that saves."""
    run = Run(1, 'fp32', 'output', **limits)
    run.steps(0, 1)
    run.save(0, max_accuracy_ema=1.0, ema_decay=0.9)
    shutdown()


def save_behind(shared: Path, limits: dict[str, Any]) -> None:
    """A script that saves in the background: the next save waits, then `shutdown`."""
    run = Run(
        1, 'fp32', 'output', CHECKPOINT__ASYNC=True, CHECKPOINT__ASYNC_COPY='overlap', **limits
    )
    run.steps(0, 1)
    run.save(0)
    run.save(1)
    shutdown()


def save_at_the_end(shared: Path, limits: dict[str, Any]) -> None:
    """A script that saves in the background and ends without `shutdown`."""
    run = Run(
        1, 'fp32', 'output', CHECKPOINT__ASYNC=True, CHECKPOINT__ASYNC_COPY='overlap', **limits
    )
    run.steps(0, 1)
    run.save(0)


def resume(shared: Path, limits: dict[str, Any]) -> None:
    """A script that goes on from the newest tag, on the same layout."""
    run = Run(1, 'fp32', 'output', seed=1, **limits)
    run.load(auto_resume_helper(str(shared / 'output'), config=run.config))
    load_ema_checkpoint(run.config, run.ema, logger)
    shutdown()


def mirror(shared: Path, limits: dict[str, Any]) -> None:
    """A script that saves to two places, loses one of them, and goes on from the other."""
    Path('mirror').mkdir(exist_ok=True)
    address = f'file://{Path("mirror").absolute()}'
    limits = {**limits, 'CHECKPOINT__MIRROR': address, 'CHECKPOINT__MIRROR_WAIT': 2.0}
    run = Run(1, 'fp32', 'output', **limits)
    run.steps(0, 1)
    run.save(0)
    uploads().finish()
    run.close()
    run = Run(1, 'fp32', 'new', seed=1, **limits)
    run.load(auto_resume_helper('new', config=run.config))
    shutdown()


def resume_other(shared: Path, limits: dict[str, Any]) -> None:
    """On another layout."""
    run = Run(2, 'fp32', 'output', seed=1, **limits)
    run.load(str(shared / 'output'))
    shutdown()


def resume_file(shared: Path, limits: dict[str, Any]) -> None:
    """From an original's file, at an address."""
    file = str(shared / 'ckpt_epoch_0.pth')
    downloads.local = lambda address, config: file  # in place of a server
    elastic.make_config = functools.partial(make_config, **limits)
    run = elastic.Run(1, 'output', seed=1, kind='adamw')
    run.load('https://example.org/ckpt_epoch_0.pth')
    shutdown()


def evaluate(shared: Path, limits: dict[str, Any]) -> None:
    """A script that loads weights only."""
    run = Run(1, 'fp32', 'output', seed=1, EVAL_MODE=True, **limits)
    run.load(str(shared / 'output' / 'ckpt_epoch_0'))
    shutdown()


def pretrained(shared: Path, limits: dict[str, Any]) -> None:
    """A script that starts from weights."""
    config = small_config(shared / 'images', **limits)
    config.MODEL.PRETRAINED = str(shared / 'output' / 'ckpt_epoch_0')
    config.MODEL.NUM_CLASSES = 5
    with deepspeed.zero.Init(config_dict_or_path={'train_batch_size': 2}):
        partitioned = make_model()
    load_pretrained(config, partitioned, logger)
    config.MODEL.PRETRAINED_READERS = 'one'
    load_pretrained(config, make_model(), logger)
    shutdown()


def stop(shared: Path, limits: dict[str, Any]) -> None:
    """A script that is asked to save between two updates."""
    config = small_config(shared / 'images', TRAIN__SAVE_MINUTES=0.001, **limits)
    with Preemption(config) as preemption:
        while preemption.reached() is None:
            time.sleep(0.05)
    shutdown()


def leave_out(shared: Path, limits: dict[str, Any]) -> None:
    """A script that trains a model of which a layer is not used."""
    model, client = leaving_out.make('adam')
    config = make_config(DATA__BATCH_SIZE=16, TRAIN__ACCUMULATION_STEPS=1, **limits)
    engine, client = initialize(config, model, client, zero_json(2))
    scaler = NativeScalerWithGradNormCount()
    x, y = on_device(*batch(0))
    scaler(cross_entropy(engine(x, way='l'), y), client)
    shutdown()


def train(shared: Path, limits: dict[str, Any]) -> None:
    """The training program: an epoch, an evaluation, two saves."""
    _train(shared, limits, CHECKPOINT__ASYNC=True, DATA__ON_ERROR='skip')


def time_updates(shared: Path, limits: dict[str, Any]) -> None:
    """The training program, started again from its best, times updates."""
    best = str(shared / 'train' / 'ckpt_epoch_best')
    monitor = {'csv_monitor': {'enabled': True, 'output_path': 'events', 'job_name': 'x'}}
    ds_config = Path(f'ds_{os.environ["RANK"]}.json')
    ds_config.write_text(json.dumps(monitor))
    values = {'MODEL__RESUME': best, 'BENCH__UPDATES': 2, 'BENCH__WARMUP': 1}
    _train(shared, limits, str(ds_config), str(shared), **values)


def fine_tune(shared: Path, limits: dict[str, Any]) -> None:
    """The training program, from pretrained weights of as many classes; evaluates only."""
    values = {'MODEL__PRETRAINED': str(shared / 'train' / 'ckpt_epoch_best'), 'EVAL_MODE': True}
    _train(shared, limits, **values)


def probe(shared: Path, limits: dict[str, Any]) -> None:
    """The training program: a head's file on InternViT in slices, and images in memory."""
    ds_config = Path(f'ds_{os.environ["RANK"]}.json')
    ds_config.write_text(json.dumps({'zero_optimization': {'stage': 3}}))
    section = {f'MODEL__INTERN_VIT_6B__{key}': value for key, value in _TINY.items()}
    values = {
        'MODEL__FACTORY': '', 'MODEL__TYPE': 'intern_vit_6b',
        'MODEL__RESUME': str(shared / 'head.pth'),
        'MODEL__INTERN_VIT_6B__PRETRAINED': str(shared / 'backbone.pth'), **section,
        'DATA__IMG_SIZE': _TINY['PRETRAIN_SIZE'], 'DATA__IMG_ON_MEMORY': True,
        'TRAIN__SHARDED_BUILD': 'always', 'BENCH__UPDATES': 1, 'BENCH__WARMUP': 0,
        'TRAIN__OPTIMIZER__ADAM': 'cpu', 'TRAIN__COMPILE': 'eager',
    }  # fmt: skip
    _train(shared, limits, str(ds_config), **values)


# Of MODEL.INTERN_VIT_6B.
_TINY = {'EMBED_DIM': 32, 'NUM_HEADS': 4, 'DEPTH': 1, 'PRETRAIN_SIZE': 28}


def _train(
    shared: Path, limits: dict[str, Any], ds_config: str | None = None, output: str = 'output',
    **more: Any,
) -> None:  # fmt: skip
    values = {
        'TRAIN__EPOCHS': 1, 'TRAIN__WARMUP_EPOCHS': 0, 'DATA__BATCH_SIZE': 2,
        'MODEL__FACTORY': 'tests.harness.training:brightness', **limits, **more,
    }  # fmt: skip
    cfg = Path(os.environ['RANK'], 'train.yaml')
    cfg.parent.mkdir()
    cfg.write_text(small_config(shared / 'images', **values).dump())
    words = ['--deepspeed_config', ds_config] if ds_config else []
    leave(program.main(['--cfg', str(cfg), '--output', output, *words]))


STORIES: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    story.__name__: story
    for story in (
        join, save, save_behind, save_at_the_end, resume, mirror, resume_other, resume_file,
        evaluate, pretrained, stop, leave_out, train, time_updates, fine_tune, probe,
    )
}  # fmt: skip


def prepare(shared: str) -> None:
    """Writes what the stories read; with the process group up."""
    loop = originals.Loop('adamw')
    loop.steps(0, 1)
    loop.save(f'{shared}/ckpt_epoch_0.pth', 0)
    if meetings.rank() == 0:
        model = tiny.tiny_model(MODEL__NUM_CLASSES=3, **_TINY)
        tiny.backbone_file(Path(shared), model)
        tiny.head_file(Path(shared), model)


def live(plan: str) -> None:
    """What a rank does, from its start to its end; the plan is a JSON file in the folder."""
    folder = Path(plan).parent
    told = json.loads(Path(plan).read_text())
    own = int(os.environ['RANK'])
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    logging.basicConfig(level=logging.INFO)
    if told['hosts']:
        _move_to(told['hosts'][own])
    os.chdir(folder)
    torch.set_num_threads(1)
    preemption_module._INTERVAL = 0.1
    places = Places(folder, own, told['place'] if own == told['stays'] else None)
    install(places)
    places.come(BEFORE_JOINING)
    if told['story'] not in ('train', 'time_updates', 'fine_tune', 'probe'):
        config = small_config(folder, **told['limits'])
        init_distributed(config)
    STORIES[told['story']](Path(told['shared']), told['limits'])


def _move_to(pid: int) -> None:
    """Has this process live on the host of another one; while it has one thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(Path(f'/proc/{pid}/ns/{kind}').open())
            for kind in ('net', 'uts', 'mnt')
        ]
        for file in files:
            if libc.setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def model(config: CfgNode) -> nn.Module:
    """For MODEL.FACTORY, under a launcher: the plan is beside the images."""
    plan = Path(config.DATA.DATA_PATH).parent / 'plan.json'
    told = json.loads(plan.read_text())
    own = meetings.rank()
    install(Places(plan.parent, own, told['place'] if own == told['stays'] else None))
    return brightness(config)
