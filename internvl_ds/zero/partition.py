"""Where each parameter's elements lie in the flat tensors of a ZeRO stage. Pure.

The layouts are DeepSpeed 0.19's (see deepspeed/utils/zero_to_fp32.py for its own reading of them);
the same two describe what a tag holds and what a running engine keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

Shapes = Mapping[str, Sequence[int]]


class Place(NamedTuple):
    """One run of a parameter's elements, in one flat tensor of one rank.

    Attributes:
        rank, group: which flat tensor.
        offset: where in it the run begins.
        start, stop: which elements of the flattened parameter it is.
    """

    rank: int
    group: int
    offset: int
    start: int
    stop: int


class Slices:
    """Stage 3: every parameter is cut into one slice per rank, zero-padded to equal length.

    A rank's flat tensor of a group holds its slices of the group's parameters, one after the other.
    With one rank and a group for each parameter it also describes whole parameters (stage 0).
    """

    def __init__(self, groups: Sequence[Shapes], ranks: int) -> None:
        self.groups = [dict(group) for group in groups]
        self.ranks = ranks
        self._spans: dict[str, tuple[int, int, int, int]] = {}
        self._lengths = []
        for index, group in enumerate(self.groups):
            offset = 0
            for name, shape in group.items():
                numel = math.prod(shape)
                length = math.ceil(numel / ranks)
                self._spans[name] = (index, offset, length, numel)
                offset += length
            self._lengths.append(offset)

    def places(self, name: str) -> Iterator[Place]:
        """The runs of a parameter, in the order of its elements."""
        group, offset, length, numel = self._spans[name]
        for rank in range(self.ranks):
            start, stop = rank * length, min((rank + 1) * length, numel)
            if start < stop:
                yield Place(rank, group, offset, start, stop)

    def least_length(self, rank: int, group: int) -> int:
        """The least number of elements of the flat tensor."""
        return self._lengths[group]


class Runs:
    """Stages 1 and 2: a group's parameters lie end to end, and the whole is cut, one part a rank.

    Args:
        groups: name -> shape of each group's parameters, in their order there.
        gaps: for each group, the padding after each of its parameters.
        sizes: for each group, the elements of one rank's part, the padding at the end included.
        ranks: how many parts there are.
    """

    def __init__(
        self,
        groups: Sequence[Shapes],
        gaps: Sequence[Sequence[int]] | None,
        sizes: Sequence[int],
        ranks: int,
    ) -> None:
        self.groups = [dict(group) for group in groups]
        self.ranks = ranks
        self._sizes = list(sizes)
        self._spans: dict[str, tuple[int, int, int]] = {}
        self._ends = []
        for index, group in enumerate(self.groups):
            begin = end = 0
            between = gaps[index] if gaps else [0] * len(group)
            for (name, shape), gap in zip(group.items(), between, strict=True):
                end = begin + math.prod(shape)
                self._spans[name] = (index, begin, end)
                begin = end + gap
            self._ends.append(end)

    def places(self, name: str) -> Iterator[Place]:
        """The runs of a parameter, in the order of its elements."""
        group, begin, end = self._spans[name]
        size = self._sizes[group]
        at = begin
        while at < end:
            rank = at // size
            stop = min(end, (rank + 1) * size)
            yield Place(rank, group, at - rank * size, at - begin, stop - begin)
            at = stop

    def least_length(self, rank: int, group: int) -> int:
        """The least number of elements of the flat tensor."""
        return max(0, min(self._sizes[group], self._ends[group] - rank * self._sizes[group]))


Layout = Slices | Runs


def owned(layout: Layout, rank: int) -> list[list[tuple[str, Place]]]:
    """For each group, the runs that lie in a rank's flat tensor: (parameter name, place)."""
    return [
        [(name, place) for name in group for place in layout.places(name) if place.rank == rank]
        for group in layout.groups
    ]


def shapes_of(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a layout."""
    return {n: tuple(shape) for group in layout.groups for n, shape in group.items()}


def describe(zero_stage: int, ranks: int, precision: str) -> str:
    """Describes a layout in words, for log lines."""
    return f'ZeRO stage {zero_stage} on {ranks} rank{"s" if ranks > 1 else ""} in {precision}'
