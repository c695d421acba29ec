"""What the ranks of `tests.bench.checkpoint` do."""

from __future__ import annotations

import cProfile
import gc
import io
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from internvl_ds.checkpoint import async_save
from internvl_ds.dist.rendezvous import rank, world_size
from tests.bench import loads, saves
from tests.bench.figures import ratios_report, seconds_report
from tests.bench.harness import barrier, measure
from tests.bench.subject import Subject

_PROFILE_LINES = 25


def measure_checkpoints(
    millions: float,
    stage: int,
    rounds: int,
    seed: int,
    folder: str,
    profile: bool,
    background_only: bool = False,
) -> dict[str, Any]:
    """Saves, then loads, of one model at one ZeRO stage; the report is the same on all ranks."""
    root = Path(folder)
    subject = Subject(millions, stage)
    for _ in range(2):  # the first makes the optimizer's state
        subject.step()
    contenders = saves.contenders(subject, root)
    if background_only:
        contenders = {name: contenders[name] for name in saves.BACKGROUND}
    samples = measure(contenders, rounds, seed)
    gc.collect()  # the copies that saves were compared with

    tag = subject.save(root / 'load')
    loads.require_restored(subject, tag, root / 'none')
    memory = {}
    if not background_only:
        memory = loads.memory_report(subject, tag)
        samples |= measure(loads.contenders(subject, tag), rounds, seed)
    pairs = [p for p in (*saves.PAIRS, *loads.PAIRS) if {p.a, p.b} <= samples.keys()]

    return {
        'millions': millions,
        'stage': stage,
        'parameters': subject.parameters,
        'tensors': subject.tensors,
        'ranks': world_size(),
        'tag_bytes': sum(path.stat().st_size for path in tag.iterdir()),
        'torch': str(torch.__version__),
        'seconds': seconds_report(samples),
        'ratios': ratios_report(samples, pairs),
        'memory': memory,
        'profiles': _profiles(subject, root, tag) if profile else {},
    }


def _profiles(subject: Subject, root: Path, tag: Path) -> dict[str, str]:
    """Where the main thread of this rank spends its time, in one call of each."""
    output = root / 'profiled'
    found = {'save': _profiled(lambda: subject.save(output))}
    for _ in range(2):  # the second finds the buffers of the first
        found['async save, blocked'] = _profiled(lambda: subject.save(output, in_background=True))
        async_save.wait()
    found['load'] = _profiled(lambda: subject.load(tag))
    return found


def _profiled(action: Callable[[], object]) -> str:
    barrier()
    profile = cProfile.Profile()
    profile.runcall(action) if rank() == 0 else action()
    barrier()
    text = io.StringIO()
    if rank() == 0:
        pstats.Stats(profile, stream=text).sort_stats('tottime').print_stats(_PROFILE_LINES)
    return text.getvalue()
