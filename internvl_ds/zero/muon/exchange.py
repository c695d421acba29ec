"""Brings each matrix whole to one rank, and what becomes of it back to the ranks it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import deepspeed.comm as dist
import torch

from internvl_ds.zero.partition import Layout, Place

# Replaces the elements of a whole parameter, which is flat; gets its name, too.
Work = Callable[[str, torch.Tensor], None]

_LIMIT = 1 << 25  # elements


def shared_out(layout: Layout, group: int, limit: int = _LIMIT) -> list[dict[str, int]]:
    """Shares a group's matrices out: each goes to one of the ranks that have a part of it.

    At stages 1 and 2 most lie on one rank alone. Where several have parts, the one with the least
    work so far gets it. Each rank makes the same plan.

    Args:
        layout: of the engine.
        group: which of its groups.
        limit: the most elements that a rank gets in one round, where a matrix has not more.

    Returns:
        For each round, parameter -> the rank that gets it.
    """
    work, filled, at = ([0] * layout.ranks for _ in range(3))
    rounds: list[dict[str, int]] = []
    holders = {name: [p.rank for p in layout.places(name)] for name in layout.groups[group]}
    # Those without elements lie nowhere.
    for name in sorted(filter(holders.get, holders), key=lambda name: len(holders[name])):
        owner = min(holders[name], key=lambda rank: work[rank])
        shape = layout.groups[group][name]
        numel = math.prod(shape)
        work[owner] += numel * min(shape[0], numel // shape[0])
        if filled[owner] and filled[owner] + numel > limit:
            at[owner], filled[owner] = at[owner] + 1, 0
        filled[owner] += numel
        rounds += [{} for _ in range(at[owner] + 1 - len(rounds))]
        rounds[at[owner]][name] = owner
    return rounds


class Round:
    """Parameters of a group that go whole to one rank each, all at once.

    Args:
        layout: of the engine.
        own_rank: in the layout.
        owners: parameter -> the rank that gets it; the same on each rank.
    """

    def __init__(self, layout: Layout, own_rank: int, owners: Mapping[str, int]) -> None:
        sent: list[list[Place]] = [[] for _ in range(layout.ranks)]
        taken: list[list[tuple[str, int]]] = [[] for _ in range(layout.ranks)]
        self._is_apart = False  # on each rank alike
        for name, owner in owners.items():
            places = list(layout.places(name))
            self._is_apart |= len(places) > 1
            for place in places:
                if place.rank == own_rank:
                    sent[owner].append(place)
                if owner == own_rank:
                    taken[place.rank].append((name, place.stop - place.start))
        self._sent, self._taken = list(chain(*sent)), list(chain(*taken))
        self._counts_sent = [sum(p.stop - p.start for p in places) for places in sent]
        self._counts_taken = [sum(length for _, length in runs) for runs in taken]

    @torch.no_grad()
    def replace(self, flat: torch.Tensor, work: Work, device: torch.device) -> None:
        """Replaces the elements of the parameters. Collective: every rank calls it.

        A rank keeps two buffers meanwhile, of its elements of these parameters and of the
        parameters that it gets, and one of those whole.

        Args:
            flat: this rank's part of the group; what is between the parameters stays.
            work: called for each parameter on the rank that gets it.
            device: which the process group takes tensors of.
        """
        parts = [flat[p.offset : p.offset + p.stop - p.start] for p in self._sent]
        out = torch.cat(parts).to(device) if parts else flat.new_empty(0, device=device)
        whole = out.new_empty(sum(self._counts_taken))
        self._move(out, whole, self._counts_sent, self._counts_taken)
        pieces: dict[str, list[torch.Tensor]] = {}
        lengths = [length for _, length in self._taken]
        for (name, _), piece in zip(self._taken, whole.split(lengths), strict=True):
            pieces.setdefault(name, []).append(piece)
        for name, own in pieces.items():
            tensor = torch.cat(own)  # ranks have them in order
            work(name, tensor)
            _scatter(tensor, own)
        self._move(whole, out, self._counts_taken, self._counts_sent)
        _scatter(out, parts)

    def _move(
        self, source: torch.Tensor, target: torch.Tensor, sent: list[int], taken: list[int]
    ) -> None:
        if self._is_apart:
            dist.all_to_all_single(target, source, taken, sent)
        else:
            target.copy_(source)


def _scatter(tensor: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Copies a tensor to its parts, one after the other."""
    for part, values in zip(parts, tensor.split([p.numel() for p in parts]), strict=True):
        part.copy_(values)
