"""What ranks do in test_comm.py and test_engine.py."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from timm.scheduler import CosineLRScheduler
from torch import nn

from internvl_ds import (
    NativeScalerWithGradNormCount,
    auto_resume_helper,
    initialize,
    reduce_tensor,
    register,
    save_checkpoint,
)
from internvl_ds.checkpoint import async_save
from internvl_ds.dist.group import current_group
from internvl_ds.dist.peers import Peers, background_meetings
from internvl_ds.dist.preemption import Preemption
from internvl_ds.dist.reduce import reduce_tensors
from internvl_ds.dist.rendezvous import (
    agree,
    connect_peers,
    exchange,
    from_rank_0,
    gather,
    rank,
    world_size,
)
from internvl_ds.engine.registry import engine_of
from internvl_ds.errors import CheckpointError, CheckpointNotFound
from tests.engine.stepping import masters
from tests.harness.calls import message_of
from tests.harness.model import make_config, make_model, make_optimizer, micro_batch, zero_json

_log = logging.getLogger(__name__)


def reduce() -> dict[str, Any]:
    """reduce_tensor of several dtypes and shapes."""
    value = torch.tensor([float(rank()), 1.0])
    mean = reduce_tensor(value)
    counts = torch.tensor([[rank(), 3]])
    halves = torch.full((2,), float(rank()), dtype=torch.bfloat16)
    several = reduce_tensors([value, counts, halves])
    return {
        'several': [[str(t.dtype), t.tolist()] for t in several],
        'mean': mean.tolist(),
        'input': value.tolist(),
        'scalar': float(reduce_tensor(torch.tensor(float(rank())))),
        'integer': float(reduce_tensor(torch.tensor(rank()))),
        'bf16': str(reduce_tensor(torch.ones(3, dtype=torch.bfloat16)).dtype),
        'shared': mean.data_ptr() == value.data_ptr(),
    }


def meet() -> dict[str, Any]:
    """Meetings in order; one rank slow, one failing."""
    results: dict[str, Any] = {}
    results['rounds'] = [exchange('count', [rank(), n], 20) for n in range(3)]
    if rank() == 1:
        time.sleep(1)
    results['slow'] = exchange('slow', rank(), 20)

    def part() -> int:
        if rank() == 1:
            raise OSError(28, 'No space left on device')
        return rank()

    results['agree'] = message_of(lambda: agree('write', part, 20, CheckpointError))
    results['after'] = agree('write', rank, 20)

    def find() -> str:
        raise CheckpointNotFound('nothing there')

    results['rank 0'] = message_of(lambda: from_rank_0('find', find, 20))
    results['told'] = from_rank_0('find', lambda: {'path': rank()}, 20)
    return results


def missing() -> dict[str, Any]:
    """The last rank comes late to a meeting of 2 s; the others name it and can go on."""
    last = world_size() - 1
    message = ''
    if rank() != last:
        message = message_of(lambda: exchange('save', 'x', 2))
    torch.distributed.barrier()
    later = exchange('save', rank(), 20)

    def resume() -> str:
        found = message_of(lambda: auto_resume_helper('/none')) if rank() != last else ''
        torch.distributed.barrier()
        return found

    model = make_model()
    config = make_config(DATA__BATCH_SIZE=4, CHECKPOINT__RENDEZVOUS_TIMEOUT=3)
    engine = initialize(config, model, make_optimizer(model), zero_json(0))
    of_engine = resume()
    os.environ['INTERNVL_DS_RENDEZVOUS_TIMEOUT'] = '1'
    return {
        'message': message,
        'later': later,
        'engine': of_engine,
        'environment': resume(),
        'of': len(engine),
    }


def engine_from_any() -> dict[str, Any]:
    """Which objects an engine is found from, at each stage."""
    results: dict[str, Any] = {}
    for stage in range(4):
        model = make_model()
        client = make_optimizer(model)
        engine, optimizer = initialize(
            make_config(DATA__BATCH_SIZE=8), model, client, zero_json(stage)
        )
        parts = (engine, engine.module, model, optimizer, client)
        results[str(stage)] = all(engine_of(part) is engine for part in parts)
        engine.destroy()
    return results


def plain_engine(stage: int, folder: str | None = None) -> dict[str, Any]:
    """An engine of plain deepspeed.initialize: unregistered, as itself, and registered.

    With a folder its ds_config is a file there.
    """
    model = make_model()
    ds_config: Any = {
        'train_micro_batch_size_per_gpu': 8,
        'gradient_clipping': 0.1,
        'zero_allow_untested_optimizer': True,
        **zero_json(stage),
    }
    if folder:
        path = Path(folder, f'rank{rank()}.json')
        path.write_text(json.dumps(ds_config))
        ds_config = str(path)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
        config=ds_config,
    )
    scaler = NativeScalerWithGradNormCount()

    def step(optimizer: Any, clip_grad: float | None = None) -> Any:
        x, y = micro_batch(0, 0, 1, rank(), world_size())
        return scaler(nn.functional.cross_entropy(engine(x), y), optimizer, clip_grad)

    def moved_by(action: Any) -> list[float]:
        before = masters(engine)
        norm, after = float(action()), masters(engine)
        ways = [a - b for n in after for a, b in zip(after[n], before[n], strict=True)]
        return [norm, math.hypot(*ways)]

    unknown = message_of(lambda: engine_of(model))
    as_itself = moved_by(lambda: step(engine))
    same = register(engine) is engine and engine_of(model) is engine
    return {
        'unknown': unknown,
        'unclipped': as_itself,
        'registered': same,
        'clipped': moved_by(lambda: step(optimizer, 0.02)),
        'wrong': message_of(lambda: register(model)),
    }


def refusals() -> dict[str, str]:
    """What initialize refuses before it makes an engine."""

    def start(ds: dict[str, Any] | None = None, **values: Any) -> None:
        model = make_model()
        if values.pop('double', False):
            model.shift = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
        in_code, schedule = values.pop('in_code', True), values.pop('schedule', None)
        client = make_optimizer(model) if in_code else None
        scheduler = None
        if schedule is not None:
            scheduler = CosineLRScheduler(client, 10, t_in_epochs=schedule == 'epochs')
        initialize(
            make_config(DATA__BATCH_SIZE=8, **values),
            model,
            client,
            ds,
            lr_scheduler=None if schedule == 'not passed' else scheduler,
        )

    def second_order() -> None:
        model = make_model()
        client = make_optimizer(model)
        initialize(make_config(DATA__BATCH_SIZE=8), model, client)
        loss = model(torch.ones(2, 12)).sum()
        NativeScalerWithGradNormCount()(loss, client, create_graph=True)

    bf16 = {'AMP_OPT_LEVEL': 'O2', 'AMP_TYPE': 'bfloat16'}

    def accumulate_in_fp32(stage: int) -> str:
        tree = {'zero_optimization': {'stage': stage}, 'data_types': {'grad_accum_dtype': 'fp32'}}
        return message_of(lambda: start(tree, **bf16))

    get_accelerator().is_fp16_supported = lambda: False  # some CPUs have it
    adam = {'optimizer': {'type': 'AdamW', 'params': {'lr': 0.1}}}
    return {
        'fp16': message_of(lambda: start(AMP_OPT_LEVEL='O2')),
        'two optimizers': message_of(lambda: start(adam)),
        'scheduler not passed': message_of(lambda: start(schedule='not passed')),
        'epoch scheduler': message_of(lambda: start(schedule='epochs')),
        'unmanaged': message_of(lambda: start({'managed_gradient_accumulation': False})),
        'fp32 accumulation 0': accumulate_in_fp32(0),
        'fp32 accumulation 1': accumulate_in_fp32(1),
        'fused': message_of(lambda: start(adam, in_code=False, **bf16)),
        'unchecked': message_of(
            lambda: start({'bf16': {'enabled': True, 'check_grad_overflow': False}}, **bf16)
        ),
        'no norm': message_of(
            lambda: start({'zero_optimization': {'stage': 2, 'compute_grad_norm': False}})
        ),
        'second order': message_of(second_order),
        'first dtype': message_of(lambda: start(zero_json(3), double=True)),
        'contradiction': message_of(lambda: start({'gradient_accumulation_steps': 3, **adam},
                                                TRAIN__ACCUMULATION_STEPS=2)),
    }  # fmt: skip


def gather_twice() -> list[Any]:
    """What rank 0 hears, twice, so that keys of the first time are not in the way."""
    return [gather('shards', {'rank': rank(), 'round': n}, 30) for n in range(2)]


def meet_in_the_background() -> list[str]:
    """Threads meet while the main thread of rank 0 waits for the others in a meeting of its own."""
    order = []
    peers = connect_peers()

    def meet() -> None:
        with background_meetings(peers):
            order.append(f'threads of {exchange("threads", rank(), 30)}')

    thread = threading.Thread(target=meet)
    thread.start()
    if rank() == 0:
        exchange('main', 0, 30)
        order.append('main')
        thread.join()
    else:
        thread.join()
        exchange('main', rank(), 30)
        order.append('main')
    return order


def connections_to_the_store(folder: str) -> int:
    """How many this rank holds while a Preemption watches, after three background saves."""
    config = make_config(folder, CHECKPOINT__ASYNC=True)
    model = make_model()
    engine, optimizer = initialize(config, model, make_optimizer(model), zero_json(1))
    scaler = NativeScalerWithGradNormCount()
    with Preemption(config):
        for epoch in range(3):
            save_checkpoint(config, epoch, engine, 0.0, optimizer, None, scaler, _log)
            async_save.wait()
        port = int(os.environ['MASTER_PORT'])
        links = psutil.Process().net_connections('tcp')
        return sum(bool(link.raddr) and link.raddr.port == port for link in links)


def meet_after_the_group_is_gone() -> list[int]:
    """A thread still knows the other ranks when the main thread has left the process group."""
    peers = connect_peers()
    torch.distributed.destroy_process_group()
    with background_meetings(peers):
        ranks = exchange('late', rank(), 30)
        exchange('all have read', None, 30)
        return ranks


def rank_0_ends_at_once(folder: str) -> None:
    """Rank 0 ends right after a meeting; rank 1 is slow to read what was brought."""
    if rank() == 0:
        exchange('last', 0, 20)
        (next(Path(folder).glob('ranks-*')) / 'result_0.json').write_text('null')
        os._exit(0)
    read = Peers.texts_at

    def slow(*given: Any) -> Any:
        time.sleep(1)
        return read(*given)

    Peers.texts_at = slow  # type: ignore[method-assign]
    brought = exchange('last', 1, 20)
    (next(Path(folder).glob('ranks-*')) / 'result_1.json').write_text(str(brought))
    os._exit(0)


def wait_for_a_lost_rank(stage: int) -> None:
    """Rank 1 does not come to the second update; COMM.TIMEOUT ends the wait of rank 0."""
    config = make_config(DATA__BATCH_SIZE=8, COMM__TIMEOUT=5)
    model = make_model()
    engine, optimizer = initialize(config, model, make_optimizer(model), zero_json(stage))
    for update in range(2):  # before the first, ranks meet through the store
        x, y = micro_batch(update, 0, 1, rank(), world_size())
        loss = nn.functional.cross_entropy(engine(x), y)
        if update and rank() == 1:
            time.sleep(200)
        NativeScalerWithGradNormCount()(loss, optimizer)


class _Counted:
    """A store that counts the keys that it is asked for, and the bytes that it gives."""

    def __init__(self, store: Any) -> None:
        self._store, self.keys, self.bytes = store, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._give(self._store.multi_get(keys))

    def get(self, key: str) -> bytes:
        return self._give([self._store.get(key)])[0]

    def _give(self, texts: list[bytes]) -> list[bytes]:
        self.keys += len(texts)
        self.bytes += sum(map(len, texts))
        return texts


def read_keys(rounds: int) -> dict[str, list[int]]:
    """Keys and bytes that a rank reads in meetings of different values, and of equal ones."""
    exchange('first', None, 20)
    client = current_group().peers.client  # type: ignore[union-attr]
    read = {}
    for what, value in (('different', f'rank {rank():4}'), ('equal', 'of all ' + 100 * '-')):
        client.store = _Counted(getattr(client.store, '_store', client.store))
        for _ in range(rounds):
            assert len(exchange(what, value, 20)) == world_size()
        read[what] = [client.store.keys, client.store.bytes]
    return read
