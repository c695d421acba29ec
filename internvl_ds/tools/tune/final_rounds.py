"""Chooses the finalists, orders their rounds, and ranks them. Pure.

The fastest of many noisy measurements is the luckiest one: only a second, fair comparison tells.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from internvl_ds.tools.tune.records import OK, Row

_SEARCHED = 3  # how many of the search's fastest are in the finals
MOST_FINALISTS = 2 + _SEARCHED


@dataclass(frozen=True)
class Standing:
    """The result of a finalist."""

    key: str  # of its configuration
    # its images per second over the reference's, of each round; 0 where it failed
    ratios: tuple[float, ...]
    speed: float  # its images per second, the median of all rounds

    @property
    def median(self) -> float:
        """The median of the ratios; 0 without any."""
        return statistics.median(self.ratios) if self.ratios else 0.0


def finalists(rows: Sequence[Row], shipped: Collection[str], base: str) -> list[str]:
    """The keys of the finalists, the reference first.

    They are the best of the ds_configs that ship (where one ran; it is the reference), the
    configuration as it was given (``base``), and the fastest three others.
    """
    ranking = sorted((row for row in rows if row.status == OK), key=lambda row: -row.speed)
    order = [row.key for row in ranking]
    best_shipped = [key for key in order if key in shipped][:1]
    others = [key for key in order if key not in (*best_shipped, base)][:_SEARCHED]
    return list(dict.fromkeys([*best_shipped, base, *others]))


def order_of_round(keys: Sequence[str], seed: int, number: int) -> list[str]:
    """The finalists in the order in which a round measures them: another one for each."""
    return random.Random(f'{seed} {number}').sample(list(keys), len(keys))


def standings(rows: Sequence[Row], keys: Sequence[str]) -> list[Standing]:
    """The finalists by their median ratio to the reference, best first.

    Ratios are of one round: what slows the machine down for minutes slows both. The reference is
    the first of ``keys``; so it wins unless another one is faster.
    """
    speeds: dict[int, dict[str, float]] = {}
    for row in rows:
        speeds.setdefault(row.round, {})[row.key] = row.speed
    every = [speeds[number] for number in sorted(speeds)]
    fair = [one for one in every if one.get(keys[0])]
    results = []
    for key in keys:
        ratios = tuple(one.get(key, 0.0) / one[keys[0]] for one in fair)
        speed = statistics.median([one.get(key, 0.0) for one in every] or [0.0])
        results.append(Standing(key, ratios, speed))
    # A reference that never ran again is no measure.
    return sorted(results, key=lambda s: -s.median if fair else -s.speed)


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The keys of (bytes, images per second) that none beats in both, the leanest first."""
    best, keys = 0.0, []
    for key, (_, speed) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if speed > best:
            best = speed
            keys.append(key)
    return keys
