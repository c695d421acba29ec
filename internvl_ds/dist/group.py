"""The process group object: all state of the process group that lives longer than a call."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from internvl_ds.config.tree import default_of
from internvl_ds.dist.heartbeat import Liveness

if TYPE_CHECKING:
    from internvl_ds.dist.peers import Peers

T = TypeVar('T')


@dataclass
class ProcessGroup:
    """This rank's view of the process group, from the first meeting to `shutdown`.

    A process without a process group has an object without ranks.

    Attributes:
        number: process groups that this process has left: part of all keys, for a store that
            outlives them.
        limits: COMM's limits in seconds, where they differ from the defaults.
        hook: the exception hook that says why the job ends; those under it print the traceback.
        traces: whether TRAIN.TRACEBACK asks for the traceback of every error.
        over: whether that hook has run: what fails after it, at the exit, is no cause.
        peers: the main thread's connection; None until all ranks have met.
        names: "rank 1 on HOST (pid P)" of each rank.
        hosts: HOST of each rank.
        heartbeat: knows which ranks are dead; None until all ranks have met.
        store: torch's default store, kept alive: rank 0's may serve all others.
        rounds: meetings of each name until now: part of the key that ranks meet under.
        timeout: seconds within which a collective must end; None where nothing was said.
        start: how the ranks were started, a line.
        callbacks: called before the group is left, the last one first.
        parts: what rooms above keep, by class: see `part`.
    """

    number: int = 0
    limits: dict[str, float] = field(default_factory=dict)
    hook: Callable[..., None] | None = None
    traces: bool = False
    over: bool = False
    peers: Peers | None = None
    names: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    heartbeat: Liveness | None = None
    store: Any = None
    rounds: Counter[str] = field(default_factory=Counter)
    timeout: float | None = None
    start: str = ''
    callbacks: list[Callable[[], None]] = field(default_factory=list)
    parts: dict[type, Any] = field(default_factory=dict)

    def limit(self, key: str) -> float:
        """COMM.``key`` in seconds."""
        return self.limits.get(key, default_of(f'COMM.{key}'))

    def key(self, name: str) -> str:
        """A key of the store, with the number of the group and of torchrun's restart."""
        return f'internvl_ds/{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}.{self.number}/{name}'

    def part(self, kind: type[T]) -> T:
        """The group's single object of a class; made at the first call."""
        if kind not in self.parts:
            self.parts[kind] = kind()
        return self.parts[kind]

    def named(self, ranks: list[int], most: int = 16) -> str:
        """Names ranks for a message, with host and process id if known."""
        text = ', '.join(self.names[r] if self.names else f'rank {r}' for r in ranks[:most])
        return text if len(ranks) <= most else f'{text} and {len(ranks) - most} more'

    def dead_ranks(self) -> list[int]:
        """Ranks that died long enough ago that all their messages are in the store."""
        return self.heartbeat.dead(for_seconds=1.0) if self.heartbeat else []

    def dead_holder(self) -> str:
        """Why rank 0, which holds the store, is known to be gone; '' if it is not."""
        heartbeat = self.heartbeat
        return heartbeat.describe_dead() if heartbeat and 0 in heartbeat.dead() else ''

    def disconnect(self) -> None:
        """Leaves the other ranks; the next meeting takes other keys."""
        if self.peers is not None:
            self.number += 1
            if self.heartbeat is not None:
                self.heartbeat.stop()
            self.peers.client.close(self.limit('SILENT_AFTER'))
        self.peers = self.heartbeat = self.store = None
        self.names, self.hosts = [], []
        self.rounds.clear()


_current = ProcessGroup()


def current_group() -> ProcessGroup:
    """The process group of this process."""
    return _current


def drop_group() -> None:
    """Leaves the process group; the hook and the limits hold until the process ends."""
    global _current
    group = _current
    group.disconnect()
    _current = ProcessGroup(group.number, group.limits, group.hook, group.traces, group.over)
