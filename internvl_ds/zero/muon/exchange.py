"""Brings each matrix whole to one rank, and what becomes of it back to the ranks it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import deepspeed.comm as dist
import torch

from internvl_ds.zero.partition import Layout, Place

# Parameter -> the rank that gets it whole.
Round = dict[str, int]
# Replaces the elements of a whole parameter, which is flat; gets its name, too.
Work = Callable[[str, torch.Tensor], None]

_LIMIT = 1 << 25  # elements


def rounds_of(layout: Layout, group: int, limit: int = _LIMIT) -> list[Round]:
    """Shares a group's matrices out: each goes to one of the ranks that have a part of it.

    At stages 1 and 2 most lie on one rank alone. Where several have parts, the one with the least
    work so far gets it. Each rank makes the same plan.

    Args:
        layout: of the engine.
        group: which of its groups.
        limit: the most elements that a rank gets in one round, where a matrix has not more.
    """
    work, filled, at = ([0] * layout.ranks for _ in range(3))
    rounds: list[Round] = []
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


@torch.no_grad()
def on_whole(
    flat: torch.Tensor,
    layout: Layout,
    own_rank: int,
    owners: Round,
    work: Work,
    device: torch.device,
) -> None:
    """Replaces the elements of a round's parameters, whole by whole.

    Collective: every rank calls it. A rank keeps two buffers meanwhile, of its elements of these
    parameters and of the parameters that it gets, and one of those whole.

    Args:
        flat: this rank's part of a group; what is between the parameters stays.
        layout: of the group's parameters.
        own_rank: in the layout.
        owners: the round, the same on each rank.
        work: called on the owner.
        device: which the process group takes tensors of.
    """
    ranks = range(layout.ranks)
    places = {name: list(layout.places(name)) for name in owners}
    sent = [list(_runs(places, owners, own_rank, owner)) for owner in ranks]
    taken = [list(_runs(places, owners, rank, own_rank)) for rank in ranks]
    parts = [flat[p.offset : p.offset + p.stop - p.start] for runs in sent for _, p in runs]
    out = torch.cat(parts).to(device) if parts else flat.new_empty(0, device=device)
    whole = out.new_empty(sum(map(_length, taken)))
    is_apart = any(len(runs) > 1 for runs in places.values())  # the same on each rank
    _move(out, whole, sent, taken, is_apart)
    pieces = dict(_pieces(whole, taken))
    for name in (name for name, owner in owners.items() if owner == own_rank):
        own = [pieces[name, place.start] for place in places[name]]
        tensor = torch.cat(own)
        work(name, tensor)
        for piece, place in zip(own, places[name], strict=True):
            piece.copy_(tensor[place.start : place.stop])
    _move(whole, out, taken, sent, is_apart)
    for part, result in zip(parts, out.split([p.numel() for p in parts]), strict=True):
        part.copy_(result)


Runs = Sequence[tuple[str, Place]]


def _runs(
    places: Mapping[str, Sequence[Place]], owners: Round, source: int, owner: int
) -> Iterator[tuple[str, Place]]:
    """What one rank sends to another, in order."""
    for name, runs in places.items():
        if owners[name] == owner:
            yield from ((name, place) for place in runs if place.rank == source)


def _length(runs: Runs) -> int:
    return sum(place.stop - place.start for _, place in runs)


def _pieces(
    whole: torch.Tensor, taken: Sequence[Runs]
) -> Iterator[tuple[tuple[str, int], torch.Tensor]]:
    """(parameter, its first element there) -> a view of what came."""
    at = 0
    for name, place in (run for runs in taken for run in runs):
        length = place.stop - place.start
        yield (name, place.start), whole[at : at + length]
        at += length


def _move(
    source: torch.Tensor,
    target: torch.Tensor,
    sent: Sequence[Runs],
    taken: Sequence[Runs],
    is_apart: bool,
) -> None:
    if is_apart:
        lengths = [list(map(_length, runs)) for runs in (taken, sent)]
        dist.all_to_all_single(target, source, *lengths)
    else:
        target.copy_(source)
