"""Which tags to remove after a save. Pure: tags in, names out.

A policy says which tags it wants to stay; what no policy wants goes. It is about epoch tags (saved
after one) or step tags (saved inside one). Tags saved with ``best`` are never among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class EpochTag(NamedTuple):
    """A tag and its order: compares from the oldest save to the newest.

    Attributes:
        sequence: number of the save; 0 where the tag does not say.
        epoch: from its name.
        name: of the directory.
        max_accuracy: the best accuracy up to that save; None where the tag does not say.
        step: from the name of a step tag; None for an epoch tag.
        updates: that the engine had counted, of a step tag: another batch size has other steps.
    """

    sequence: int
    epoch: int
    name: str
    max_accuracy: float | None = None
    step: int | None = None
    updates: int | None = None

    @property
    def position(self) -> tuple[int, int, int]:
        """Its position in training: finished epochs, and updates of the next one."""
        return (self.epoch + (self.step is None), self.updates or 0, self.step or 0)


class Policy(Protocol):
    """Decides which tags stay."""

    def keeps(self, tags: Sequence[EpochTag]) -> set[str]:
        """The names of the tags to keep, of all epoch and step tags, oldest save first."""
        ...


@dataclass(frozen=True)
class KeepNewest:
    """Keeps the ``count`` epoch tags saved last; below 1 keeps all.

    Counted over what exists, so that another SAVE_FREQ or a skipped epoch leaks nothing, and by
    when it was saved, so that a run that was rewound to an earlier epoch keeps what it saves now.
    """

    count: int

    def keeps(self, tags: Sequence[EpochTag]) -> set[str]:
        return {tag.name for tag in _of_epochs(tags)[-self.count if self.count > 0 else 0 :]}


@dataclass(frozen=True)
class KeepSteps:
    """Keeps the ``count`` step tags saved last; 0 asks for none."""

    count: int

    def keeps(self, tags: Sequence[EpochTag]) -> set[str]:
        steps = [tag.name for tag in tags if tag.step is not None]
        return set(steps[-self.count :]) if self.count > 0 else set()


@dataclass(frozen=True)
class KeepLater:
    """Keeps the tags of later training than the one saved last, which a rewound run left behind.

    They go when the run has come as far again: each is then replaced by a tag of its name, or an
    older save as any other. ``most`` limits them to the furthest ones, so that rewinding again and
    again cannot fill a disk: for runs that were rewound by an explicit word. None keeps all.
    """

    most: int | None = None

    def keeps(self, tags: Sequence[EpochTag]) -> set[str]:
        later = sorted(later_tags(tags), key=lambda tag: tag.position, reverse=True)
        return {tag.name for tag in later[: self.most]}


@dataclass(frozen=True)
class KeepBest:
    """Keeps the ``count`` epoch tags with the highest accuracy; 0 asks for none.

    A tag says the best accuracy up to its save: of several that say the same, the first reached it.
    """

    count: int

    def keeps(self, tags: Sequence[EpochTag]) -> set[str]:
        first_to_reach: dict[float, str] = {}
        for tag in _of_epochs(tags):
            if tag.max_accuracy is not None and not math.isnan(tag.max_accuracy):
                first_to_reach.setdefault(tag.max_accuracy, tag.name)
        best = sorted(first_to_reach, reverse=True)[: max(0, self.count)]
        return {first_to_reach[accuracy] for accuracy in best}


@dataclass(frozen=True)
class KeepEvery:
    """Keeps every epoch tag whose epoch ``interval`` divides, for good; 0 asks for none."""

    interval: int

    def keeps(self, tags: Sequence[EpochTag]) -> set[str]:
        if self.interval < 1:
            return set()
        return {tag.name for tag in _of_epochs(tags) if tag.epoch % self.interval == 0}


def tags_to_prune(tags: Iterable[EpochTag], policies: Sequence[Policy]) -> list[str]:
    """The names of the tags that no policy keeps, oldest save first.

    The tag saved last always stays: a run resumes from it.
    """
    ordered = sorted(tags, key=lambda tag: tag[:3])
    names = {ordered[-1].name} if ordered else set()
    for policy in policies:
        names |= policy.keeps(ordered)
    return [tag.name for tag in ordered if tag.name not in names]


def later_tags(tags: Sequence[EpochTag]) -> list[EpochTag]:
    """The tags of later training than the one saved last; ``tags``: oldest save first."""
    return [tag for tag in tags if tag.position > tags[-1].position]


def _of_epochs(tags: Sequence[EpochTag]) -> list[EpochTag]:
    return [tag for tag in tags if tag.step is None]
