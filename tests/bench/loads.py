"""The two ways to load one tag, their time and their memory; files are in the page cache."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from internvl_ds.checkpoint.tag.manifest import file_rank
from internvl_ds.dist.rendezvous import rank, world_size
from tests.bench.figures import Pair, verdict
from tests.bench.harness import Contender
from tests.bench.memory import peak_growth
from tests.bench.subject import Subject

PAIRS = (Pair('load ours', 'load DeepSpeed', 0.5),)
MEMORY_TARGETS = {'load ours': 0.1, 'load DeepSpeed': None}
_MEMORY_ROUNDS = 3


def contenders(subject: Subject, tag: Path) -> dict[str, Contender]:
    """Ours, which verifies checksums, and DeepSpeed's, of the same tag."""
    return {
        'load ours': Contender(lambda: subject.load(tag), lambda: _warm(tag)),
        'load DeepSpeed': Contender(lambda: subject.load_plain(tag), lambda: _warm(tag)),
    }


def require_restored(subject: Subject, tag: Path, scratch: Path) -> None:
    """Trains away from the tag and loads it, again and again in one engine.

    DeepSpeed's documentation doubts that ZeRO-3 may load after a save; the timing relies on it.
    The engine must be as it was when the tag was saved.

    Raises:
        AssertionError: names the way of loading after which something differs.
    """
    saved = [tensor.clone() for tensor in subject.shard(scratch)]
    for name, contender in [*contenders(subject, tag).items()] * 2:
        subject.step()
        if _all_equal(saved, subject.shard(scratch)):
            raise AssertionError('a training step changed nothing')
        contender.run()
        if not _all_equal(saved, subject.shard(scratch)):
            raise AssertionError(f'{name}: the state is not what was saved')


def memory_report(subject: Subject, tag: Path) -> dict[str, Any]:
    """Name -> the memory that a load needed beyond the state, as a share of the bytes read.

    The median of some untimed loads, of the rank where it is highest. Every rank must call it.
    """
    size = sum(path.stat().st_size for path in read_files(tag))
    report = {}
    for name, contender in contenders(subject, tag).items():
        shares = []
        for _ in range(_MEMORY_ROUNDS):
            contender.prepare()
            shares.append(highest(peak_growth(contender.run) / size))
        share, target = statistics.median(shares), MEMORY_TARGETS[name]
        report[name] = {
            'share': share,
            'samples': shares,
            'target': target,
            'verdict': verdict(share, target),
        }
    return report


def read_files(tag: Path) -> list[Path]:
    """The shards that this rank reads of a tag."""
    shards = sorted(tag.glob('*_states.pt'))
    return [p for p in shards if 'pp_rank' not in p.name or file_rank(p.name) == rank()]


def _warm(tag: Path) -> None:
    for path in read_files(tag):
        path.read_bytes()


def _all_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether they are equal on every rank."""
    own = len(a) == len(b) and all(map(torch.equal, a, b))
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, own)
    return all(found)


def highest(share: float) -> float:
    """Of all ranks. Every rank must call it."""
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, share)
    return max(found)
