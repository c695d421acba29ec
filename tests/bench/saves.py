"""The ways to save that are compared, and a training step beside each of them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import checkpoint as dcp

from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.tag import hashing
from internvl_ds.checkpoint.tag.manifest import file_rank
from internvl_ds.dist.rendezvous import rank
from internvl_ds.files import flush
from tests.bench.figures import Pair
from tests.bench.harness import Contender, barrier, remove_tags
from tests.bench.subject import Subject

_WRITE_BACK = 8 << 20

PAIRS = (
    Pair('save ours', 'save raw', 1.25),
    Pair('save ours', 'save raw, written back early'),
    Pair('save ours', 'save DeepSpeed', 0.85),
    Pair('save DeepSpeed', 'save raw'),
    Pair('async ours: blocked', 'copy in memory', 0.15),
    Pair('async ours: blocked', 'async DCP: blocked'),
    Pair('async ours: total', 'async DCP: total', 0.5),
    Pair('step beside ours: step', 'step', 1.05),
    Pair('step beside ours: both', 'step'),
    Pair('step after ours: step', 'step', 1.05),
    Pair('step beside DCP: step', 'step'),
    Pair('step beside ours: step', 'step beside DCP: step'),
)


# The contenders in which training goes on beside a save, or waits for its copy.
BACKGROUND = ('async ours', 'copy in memory', 'step', 'step beside ours', 'step after ours')


def contenders(subject: Subject, folder: Path) -> dict[str, Contender]:
    """Everything that saves ``subject``, each into a directory of its own below ``folder``.

    Every rank must call it. It saves once, to know what the files hold.
    """
    first = subject.save(folder / 'first')
    contents = [path.read_bytes() for path in own_files(first)]
    barrier()
    if rank() == 0:
        shutil.rmtree(folder / 'first')
    shard = subject.shard(folder / 'none')
    copies = [torch.empty_like(tensor) for tensor in shard]
    state = {f'rank {rank()}/{number}': tensor for number, tensor in enumerate(shard)}
    # Its background collectives would meet those of training in the default group.
    group = distributed.new_group(backend='gloo')

    def to(name: str, run: Callable[[Path], Mapping[str, float] | None]) -> Contender:
        path = folder / name
        return Contender(run=lambda: run(path), prepare=lambda: _empty(path))

    def copy() -> None:
        for target, source in zip(copies, shard, strict=True):
            target.copy_(source)

    def save_ours(path: Path) -> None:
        subject.save(path)

    def save_dcp(path: Path) -> Future:
        # Its writer flushes by default, and copies into fresh memory: its cache needs a GPU.
        writer = dcp.FileSystemWriter(path)
        return dcp.async_save(state, storage_writer=writer, process_group=group)  # type: ignore[return-value]

    def async_ours(path: Path) -> dict[str, float]:
        start = time.perf_counter()
        subject.save(path, in_background=True)
        blocked = time.perf_counter() - start
        async_save.wait()
        return {'blocked': blocked, 'total': time.perf_counter() - start}

    def async_dcp(path: Path) -> dict[str, float]:
        start = time.perf_counter()
        future = save_dcp(path)
        blocked = time.perf_counter() - start
        future.result()
        return {'blocked': blocked, 'total': time.perf_counter() - start}

    def step() -> dict[str, float]:
        return {'step': subject.step()}

    def step_beside_ours(path: Path) -> dict[str, float]:
        start = time.perf_counter()
        subject.save(path, in_background=True)
        parts = step()
        parts['both'] = time.perf_counter() - start
        async_save.wait()
        return parts

    def step_after_ours(path: Path) -> dict[str, float]:
        # The second one: it waits for no copy, and has the writing beside it.
        subject.save(path, in_background=True)
        step()
        parts = step()
        async_save.wait()
        return parts

    def step_beside_dcp(path: Path) -> dict[str, float]:
        future = save_dcp(path)
        parts = step()
        future.result()
        return parts

    return {
        'save ours': to('ours', save_ours),
        'save DeepSpeed': to('deepspeed', lambda path: _save_plain(subject, path)),
        'save raw': to('raw', lambda path: _write_raw(contents, path)),
        'save raw, written back early': to(
            'raw-early', lambda path: _write_raw(contents, path, write_back=_WRITE_BACK)
        ),
        'async ours': to('ours-async', async_ours),
        'async DCP': to('dcp', async_dcp),
        'copy in memory': Contender(copy, _settle),
        'step': Contender(lambda: subject.step() and None, _settle),  # type: ignore[return-value]
        'step beside ours': to('ours-step', step_beside_ours),
        'step after ours': to('ours-after', step_after_ours),
        'step beside DCP': to('dcp-step', step_beside_dcp),
    }


def own_files(tag: Path) -> list[Path]:
    """The files of a tag that this rank writes; rank 0's are also those of no rank."""
    return sorted(p for p in tag.iterdir() if p.is_file() and file_rank(p.name) == rank())


def _save_plain(subject: Subject, output: Path) -> None:
    """DeepSpeed's save, then every file and directory flushed by the rank that wrote it."""
    subject.save_plain(output, 'tag')
    paths = [*own_files(output / 'tag'), output / 'tag']
    if rank() == 0:
        paths += [p for p in output.iterdir() if p.is_file()]
        paths.append(output)
    for path in paths:
        flush(path)


def _write_raw(contents: list[bytes], output: Path, write_back: int | None = None) -> None:
    """The same bytes from memory, with nothing around them: no format, no checksum, no meeting.

    With ``write_back`` the kernel is told after so many bytes to begin writing them, as ours does:
    raw writes without it are no floor.
    """
    for number, content in enumerate(contents):
        descriptor = os.open(output / f'{rank()}-{number}', os.O_WRONLY | os.O_CREAT, 0o666)
        view, start = memoryview(content), 0
        try:
            while start < len(view):
                count = os.write(descriptor, view[start : start + (write_back or len(view))])
                if write_back:
                    hashing._start_write_back(descriptor, start, count)
                start += count
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    flush(output)


def _empty(path: Path) -> None:
    """Empties the directory: what the last sample wrote goes before the clock starts."""
    if rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
        remove_tags(path)
    _settle()


def _settle() -> None:
    """Waits until the disk has nothing left to do of what came before."""
    barrier()
    if rank() == 0:
        os.sync()
    barrier()
