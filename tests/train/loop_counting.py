"""What ranks do in test_loop_counts.py: train, with what an update asks of Python counted."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from internvl_ds.dist.preemption import Preemption
from internvl_ds.tools.selftest.subject import bare_update
from internvl_ds.tools.selftest.traffic import Traffic
from internvl_ds.train import loop
from internvl_ds.train.setup import setup
from tests.harness.training import small_config

UPDATES, EVERY = 5, 2  # of an epoch; micro-batches from one line of the log to the next
PLAIN, WITH_LINE = 3, 2  # updates with nothing else beside them, and with a line of the log


class Counts:
    """Calls of functions, Python's and C's, in each update; a loop's stopwatch.

    To take a batch is not counted.
    """

    def __init__(self) -> None:
        self.updates: list[Counter[str]] = []
        self._calls: Counter[str] | None = None

    def of(self, train: Callable[[], object]) -> list[Counter[str]]:
        """The calls of each update that a loop takes."""
        self.updates, self._calls = [], None
        sys.setprofile(self._profile)
        try:
            train()
        finally:
            sys.setprofile(None)
        return self.updates

    def batches(self, batches: Any) -> Iterator[Any]:
        """The same batches. An update begins when its batch is there."""
        source = iter(batches)
        while True:
            if self._calls is not None:
                self.updates.append(self._calls)
            self._calls = None
            try:
                batch = next(source)
            except StopIteration:
                return
            self._calls = Counter()
            yield batch

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        if self._calls is not None and event in ('call', 'c_call'):
            code = frame.f_code
            where = f'{Path(code.co_filename).name}:{code.co_name}'
            called = '' if event == 'call' else f' -> {getattr(argument, "__name__", argument)}'
            self._calls[where + called] += 1


class Traffics(Counts):
    """Collectives, and reads of the device by the host, in each update."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def of(self, train: Callable[[], object]) -> list[Counter[str]]:
        """The same, of each update."""
        self.updates, self._calls = [], None
        with Traffic(self._device) as self._traffic:
            self._before = self._now()
            train()
        return self.updates

    def batches(self, batches: Any) -> Iterator[Any]:
        """The same batches."""
        for batch in batches:
            before = self._now()
            yield batch
            self.updates.append(self._now() - before)

    def _now(self) -> Counter[str]:
        traffic = self._traffic
        return Counter(collectives=len(traffic.collectives), reads=traffic.reads)


def count(data: str, output: str, stages: list[int]) -> list[dict[str, Any]]:
    """The program's updates beside those of a bare loop on the same engine."""
    return [_count(data, f'{output}/{stage}', stage) for stage in stages]


def _count(data: str, output: str, stage: int) -> dict[str, Any]:
    config = small_config(
        Path(data), OUTPUT=output, DATA__BATCH_SIZE=2, TRAIN__EPOCHS=9, PRINT_FREQ=EVERY,
        MODEL__KWARGS={'patch_size': 8, 'embed_dim': 24, 'depth': 4, 'num_heads': 2},
    )  # fmt: skip
    state = setup(config, {'zero_optimization': {'stage': stage}}, logging.getLogger('test'))
    engine, loader, epochs = state.engine, state.loaders.train, iter(range(9))
    state.start = None
    on_device = loop.on_device
    watched: Any = None

    def ours() -> None:
        loop.train_one_epoch(state, next(epochs))
        state.position.reset()

    def bare() -> None:
        engine.train()
        for images, labels in loop.on_device(loader, engine.device):
            bare_update(engine, cross_entropy(engine(images).float(), labels))

    loop.on_device = lambda *arguments: watched.batches(on_device(*arguments))
    found = {}
    try:
        with Preemption(config) as state.preemption:
            for name, train in (('ours', ours), ('bare', bare)):
                for kind in (Traffics(engine.device), Counts()):
                    watched = kind
                    updates = kind.of(train)
                    assert len(updates) == UPDATES
                    found[f'{name} {type(kind).__name__}'] = [updates[PLAIN], updates[WITH_LINE]]
    finally:
        loop.on_device = on_device
    engine.destroy()
    return found
