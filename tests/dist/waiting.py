"""Ranks that wait for others which stand still, are dead, or never come."""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.nvtx import instrument_w_nvtx
from torch import nn

from internvl_ds import load_pretrained
from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint import reshard as elastic
from internvl_ds.checkpoint.checkpoint_engine import ShardWriter
from internvl_ds.dist import stranded
from internvl_ds.dist.group import current_group
from internvl_ds.dist.peers import Peers, background_meetings
from internvl_ds.dist.preemption import Preemption
from internvl_ds.dist.process_group import (
    init_distributed,
    limit_collectives,
    making_groups,
    shutdown,
)
from internvl_ds.dist.rendezvous import (
    agree,
    connection,
    exchange,
    from_rank_0,
    gather,
    part_from,
    raise_request,
    rank,
    request_is_raised,
)
from internvl_ds.dist.store_client import StoreClient
from internvl_ds.pretrained import transforms
from tests.harness.calls import message_of
from tests.harness.model import make_config, make_model
from tests.harness.saving import Run

_log = logging.getLogger('waiting')


def timed(action: Callable[[], Any]) -> list[Any]:
    """[seconds, what it raised or 'no error']."""
    start = time.monotonic()
    message = message_of(action)
    return [round(time.monotonic() - start, 1), message]


def all_timed(actions: dict[str, Callable[[], Any]], most: float) -> dict[str, list[Any]]:
    """`timed` of each, on a thread each; [None, ''] of those that are not done after ``most``."""
    done: dict[str, list[Any]] = {}

    def run(name: str) -> None:
        done[name] = timed(actions[name])

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in actions]
    deadline = time.monotonic() + most
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    return {name: done.get(name, [None, '']) for name in actions}


@contextmanager
def away(pid: int, how: str, folder: str) -> Iterator[None]:
    """Has a process stand still, or waits until the test has cut this host off."""
    if how == 'cut':
        Path(folder, 'ready').touch()
        wait_for(Path(folder, 'cut'))
        yield
        return
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def wait_for(path: Path) -> None:
    """Until it is there."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def own_peers() -> Peers:
    """Peers over a connection that nobody else waits for."""
    main = connection('first meeting', 30)
    client = StoreClient(lambda: main.client.store.clone(), main.client.holder, main.client.dead)
    return Peers(client, main.rank, main.world_size)


def calls_of_the_store(limit: float) -> dict[str, Callable[[], Any]]:
    """Every kind of call, through connections that were there before and through new ones."""
    key = 'internvl_ds/test'
    kinds: dict[str, Callable[[Any], Any]] = {
        'set': lambda store: [store.set(key, '1'), store.check([key])],
        'get': lambda store: store.get(key),
        'add': lambda store: store.add(f'{key}/count', 1),
        'check': lambda store: store.check([key]),
        'delete_key': lambda store: store.delete_key(key),
        'multi_get': lambda store: store.multi_get([key]),
        'wait': lambda store: store.wait([f'{key}/never']),
        'clone': lambda store: store.clone(),
    }
    calls: dict[str, Callable[[], Any]] = {}
    for name, kind in kinds.items():
        old, new = own_peers(), own_peers()
        old.client.call(lambda store: store.set(key, '1'), limit)
        calls[name] = lambda old=old, kind=kind: old.client.call(kind, limit)
        calls[f'{name}, new connection'] = lambda new=new, kind=kind: new.client.call(kind, limit)
    return calls


def meetings_of_threads(limit: float) -> dict[str, Callable[[], Any]]:
    """What goes through the store, each on a connection of its own."""
    kinds: dict[str, Callable[[Any], Any]] = {
        'exchange': lambda peers: exchange('t exchange', 1, limit),
        'gather': lambda peers: gather('t gather', 1, limit),
        'agree': lambda peers: agree('t agree', lambda: 1, limit),
        'from_rank_0': lambda peers: from_rank_0('t from', lambda: 1, limit),
        'request_is_raised': lambda peers: request_is_raised('t', peers, limit),
        'raise_request': lambda peers: raise_request('t', peers),
        'part_from': part_from,
    }

    def meet(peers: Any, kind: Callable[[Any], Any]) -> None:
        with background_meetings(peers):
            kind(peers)

    made = {name: own_peers() for name in kinds}
    for peers in made.values():
        peers.client.call(lambda store: store.check(['x']), limit)
    return {name: lambda n=name: meet(made[n], kinds[n]) for name in kinds}


def rank_0_is_away(limit: float, folder: str, how: str) -> None:
    """What each of rank 1's calls does meanwhile, and at what time.

    Args:
        limit: seconds, of each.
        folder: of both ranks.
        how: 'stopped' or 'cut'.
    """
    current_group().limits.update({'EXIT_TIMEOUT': limit, 'TIMEOUT': limit})
    pid = exchange('pid', os.getpid(), 30)[0]
    found: dict[str, Any] = {}
    preemption = Preemption(make_config('', CHECKPOINT__RENDEZVOUS_TIMEOUT=limit))
    if rank() == 0:
        if how == 'cut':
            wait_for(Path(folder, 'cut'))
            found['rank 0 waits'] = timed(lambda: exchange('rank 1 is cut off', None, 1800))
        wait_for(Path(folder, 'over'))
    else:
        calls = {**calls_of_the_store(limit), **meetings_of_threads(limit)}

        def boundaries() -> None:
            while True:
                preemption.reached()
                time.sleep(0.1)

        def make_group() -> None:  # as deepspeed.initialize does
            limit_collectives(make_config('', COMM__TIMEOUT=int(limit)))
            with making_groups():
                torch.distributed.new_group()

        calls['preemption'] = boundaries
        with away(pid, how, folder):
            found.update(all_timed(calls, limit + 15))
            found['making a group'] = timed(make_group)
            found['again'] = timed(lambda: exchange('main', 1, limit))
            found['shutdown'] = timed(shutdown)
        Path(folder, 'over').touch()
    leave_result(folder, found)
    os._exit(0)


def leave_result(folder: str, value: Any) -> None:
    """As the harness does, for a rank that ends by itself."""
    own = int(os.environ['RANK'])
    (next(Path(folder).glob('ranks-*')) / f'result_{own}.json').write_text(json.dumps(value))


def ranks_that_miss_each_other(limit: int) -> dict[str, Any]:
    """Starts that fail, on three ranks; each at a port of its own."""
    own, ports = rank(), []
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            ports.append(probe.getsockname()[1])
    ports = exchange('ports', ports, 30)[0]
    pid = exchange('pid', os.getpid(), 30)[0]
    shutdown()
    config = make_config('', COMM__INIT_TIMEOUT=limit)
    found: dict[str, Any] = {}

    def start(name: str, address: str, port: int) -> None:
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
        found[name] = timed(lambda: init_distributed(config))

    began = time.monotonic()
    if own == 0:
        start('others are missing', '127.0.0.1', ports[0])
    elif own == 1:
        start('rank 0 is missing', '127.0.0.1', ports[1])
    else:
        start('no such host', '240.0.0.1', ports[1])
    time.sleep(max(0, began + limit + 6 - time.monotonic()))
    if own == 2:
        with socket.create_server(('127.0.0.1', 0)) as silent:  # accepts, and never answers
            start('another program', '127.0.0.1', silent.getsockname()[1])
        return found
    if own == 1:
        threading.Timer(2, lambda: os.kill(pid, signal.SIGSTOP)).start()
    start('rank 0 stands still', '127.0.0.1', ports[2])
    if own == 1:
        os.kill(pid, signal.SIGCONT)
    return found


def a_rank_dies(how: str, dies: int, folder: str) -> None:
    """A rank of three is killed while it writes; the others wait for it, with the longest limits.

    Args:
        how: 'sync' or 'async': in such a save.
        dies: the rank.
        folder: of all ranks.
    """
    run = Run(
        1, 'fp32', f'{folder}/out', CHECKPOINT__ASYNC=how == 'async', CHECKPOINT__IO_TIMEOUT=1800,
        CHECKPOINT__RENDEZVOUS_TIMEOUT=300,
    )  # fmt: skip
    run.steps(0, 1)
    if rank() == dies:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    else:  # nobody is done before that one is dead
        fsync = os.fsync
        os.fsync = lambda descriptor: [time.sleep(1), fsync(descriptor)][1]  # type: ignore
    found = {}

    def save() -> None:
        run.save(0)
        async_save.wait()

    found['save'] = timed(save)
    found['next save'] = timed(save)
    found['a meeting'] = timed(lambda: exchange('x', 1, 1800))
    found['shutdown'] = timed(shutdown)
    leave_result(folder, found)
    os._exit(0)


def a_rank_dies_as_it_comes(folder: str) -> None:
    """Rank 1, the last to come, is killed before it can say that all are there."""
    if rank() == 1:
        while not exists_in_store('x/0/0'):
            time.sleep(0.05)

        def come(peers: Peers, place: str, text: str = '') -> None:
            peers.client.call(lambda store: store.set(f'{place}/1', text), 60)
            os.kill(os.getpid(), signal.SIGKILL)

        Peers.come = come  # type: ignore[method-assign]
    leave_result(folder, timed(lambda: exchange('x', rank(), 300)))
    os._exit(0)


def a_rank_dies_whose_child_lives(folder: str, waits: str) -> None:
    """Rank 1 is killed; its child keeps its connections open, as a loader's worker does.

    Args:
        folder: where exit functions leave a file.
        waits: 'at once', or 'later' as DeepSpeed waits for what it gathers at stage 3.
    """
    init_distributed(make_config('', COMM__DEAD_AFTER=4))
    x = torch.ones(1)
    torch.distributed.all_reduce(x)
    if rank() == 1:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    atexit.register(leave_result, folder, time.monotonic())
    if waits == 'at once':
        torch.distributed.all_reduce(x)
    handle = torch.distributed.all_reduce(x, async_op=True)
    instrument_w_nvtx(handle.wait)()


def a_rank_dies_beside_a_device(folder: str, device: str) -> None:
    """Rank 1 is killed while rank 0's main thread waits for its device, in C code.

    Args:
        folder: where exit functions leave a file.
        device: the name that rank 0's accelerator says it has.
    """
    init_distributed(make_config('', COMM__DEAD_AFTER=4))
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    get_accelerator().device_name = lambda *index: device
    atexit.register(leave_result, folder, time.monotonic())
    ctypes.CDLL(None).sleep(20)  # as cudaStreamSynchronize: without the interpreter's lock


def a_rank_stands_still_beside_a_device(folder: str, aborts: bool) -> None:
    """Rank 1 is stopped, and not dead, while rank 0 waits in C code, as NCCL does.

    Args:
        folder: where rank 0 leaves what it said.
        aborts: whether something ends it at the limit.
    """
    words: list[str] = []
    moving: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]
    stranded.logger.addHandler(handler)
    init_distributed(make_config('', COMM__TIMEOUT=5))
    heartbeat = current_group().heartbeat
    assert heartbeat is not None
    heartbeat._silent_after = 2
    stranded._runs_on_device = lambda: True
    stranded.end_at_timeout(lambda: leave_result(folder, [moving, words]) or os._exit(1))
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(2):  # it moves: nothing is said
        ctypes.CDLL(None).sleep(3)
    moving += words

    def abort() -> None:
        leave_result(folder, [moving, words])
        os.abort()

    if aborts:  # as NCCL's watchdog does, which has the same limit
        threading.Timer(5, abort).start()
    ctypes.CDLL(None).sleep(60)


def a_collective_in_a_meeting(folder: str) -> None:
    """Rank 1 stands still; rank 0 misses it in a collective, then in the meeting that it is in."""
    limit_collectives(make_config('', COMM__TIMEOUT=5))
    x = torch.ones(1)
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    leave_result(folder, timed(lambda: agree('x', lambda: torch.distributed.all_reduce(x), 5)))
    os._exit(1)  # the other one would never end


def a_rank_leaves_early() -> float:
    """Rank 2 has left in order; the others use a group without it, one of them late."""
    init_distributed(make_config('', COMM__DEAD_AFTER=2))
    pair, x = torch.distributed.new_group([0, 1]), torch.ones(1)
    if rank() < 2:
        time.sleep(6 * rank())
        torch.distributed.all_reduce(x, group=pair)
    shutdown()
    return float(x)


def exists_in_store(place: str) -> bool:
    group = current_group()
    assert group.peers is not None
    return group.peers.client.call(lambda store: store.check([group.key(place)]), 60)


LIMIT, SLOW = 3, 4.5  # COMM.TIMEOUT, and how long a disk takes; seconds


def slow_disk(root: str, stages: list[int]) -> dict[str, Any]:
    """Rank 1's disk is slower than a collective may be: in a save, a load, and pretrained weights.

    Returns:
        For each stage: what save and load raised, whether the group works afterwards, and how many
        bytes of memory the save held that were not there before.
    """
    found: dict[str, Any] = {}

    def slow_once(owner: Any, name: str, who: int) -> None:
        action, waits = getattr(owner, name), [SLOW] if rank() == who else []

        def slowly(*given: Any, **named: Any) -> Any:
            time.sleep(waits.pop() if waits else 0)
            return action(*given, **named)

        setattr(owner, name, slowly)

    def run_of(stage: int, root: str) -> Run:
        run = Run(stage, 'fp32', root, CHECKPOINT__IO_TIMEOUT=120, COMM__TIMEOUT=120)
        run.steps(0, 1)
        limit_collectives(make_config('', COMM__TIMEOUT=LIMIT))
        return run

    for stage in stages:
        run = run_of(stage, f'{root}/{stage}')
        slow_once(os, 'fsync', 1)
        before, held = _storages(gc.get_objects()), []
        finish = ShardWriter.finish

        def measured(writer: ShardWriter, finish: Any = finish) -> None:
            now = _storages(gc.get_objects())
            held.append(sum(size for pointer, size in now.items() if pointer not in before))
            finish(writer)

        ShardWriter.finish = measured  # type: ignore[method-assign]
        own: dict[str, Any] = {'save': message_of(lambda: run.save(0)), 'held': held[0]}
        ShardWriter.finish = finish  # type: ignore[method-assign]
        # DeepSpeed's own load, and that of another layout, with collectives between reads.
        slow_once(ShardWriter, 'load', 1)
        own['load'] = message_of(lambda: run.load(f'{root}/{stage}/ckpt_epoch_0'))
        if stage > 1:
            slow_once(elastic, 'fill', 1)
            other = f'{root}/{2 if stage == 3 and 2 in stages else 1}/ckpt_epoch_0'
            own['load other'] = message_of(lambda: run.load(other))
        own['steps'] = len(run.steps(1, 2))
        run.close()
        found[str(stage)] = own
    config = make_config(
        '', MODEL__PRETRAINED=f'{root}/1/ckpt_epoch_0', MODEL__PRETRAINED_READERS='one',
        COMM__TIMEOUT=LIMIT,
    )  # fmt: skip
    slow_once(transforms, 'read', 0)
    found['pretrained'] = message_of(lambda: load_pretrained(config, make_model(), _log))
    return found


def _storages(objects: list[Any]) -> dict[int, int]:
    storages = [o.untyped_storage() for o in objects if type(o) in (torch.Tensor, nn.Parameter)]
    return {s.data_ptr(): s.nbytes() for s in storages}


if __name__ == '__main__':
    init_distributed()
    rank_0_is_away(float(sys.argv[1]), sys.argv[2], 'cut')
