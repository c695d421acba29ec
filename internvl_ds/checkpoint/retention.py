"""Which tags go after a save. Pure: a list of tags in, a list of names out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class EpochTag(NamedTuple):
    """An epoch tag that exists, and what orders it; compares from oldest to newest."""

    sequence: int
    epoch: int
    name: str


def tags_to_prune(tags: Sequence[EpochTag], keep: int) -> list[str]:
    """The names that go so that the newest ``keep`` epoch tags stay.

    Newest means saved last: a run that was rewound to an earlier epoch keeps what it saves now.
    Counted over what exists, so that another SAVE_FREQ or a skipped epoch leaks nothing. Tags
    saved with ``best`` are not epoch tags and are never among them.

    Args:
        tags: all epoch tags of an output directory, in any order.
        keep: SAVE_CKPT_NUM; below 1 keeps all.
    """
    if keep < 1:
        return []
    return [tag.name for tag in sorted(tags)[:-keep]]
