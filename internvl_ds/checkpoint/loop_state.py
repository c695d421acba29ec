"""What each rank's training loop goes on with: its generators, and its position in the epoch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_ds.checkpoint.manifest import LOOP_FILE
from internvl_ds.checkpoint.rng import set_rng_state
from internvl_ds.checkpoint.state import read_own
from internvl_ds.errors import CheckpointError
from internvl_ds.meetings import agree, rank, world_size


def read_loop(path: Path, saved_ranks: int) -> dict[str, Any] | None:
    """What a tag keeps for this rank's loop; on other ranks than before, rank 0's.

    Returns:
        None for a tag of plain DeepSpeed, or of an earlier version.

    Raises:
        CheckpointError: when the file cannot be read, or is another rank's or another save's.
    """
    return read_own(path, LOOP_FILE.format(rank() if saved_ranks == world_size() else 0))


def restore_loop(
    path: Path,
    state: Mapping[str, Any],
    saved_ranks: int,
    loop: Any,
    timeout: float,
    logger: logging.Logger,
) -> None:
    """Restores this rank's generators and ``loop`` from a tag. A meeting of all ranks.

    Args:
        path: the tag.
        state: what its state.json says.
        saved_ranks: how many ranks saved it. On another number of them the generators stay as they
            are, and ``loop`` gets what rank 0's said.
        loop: see `load_checkpoint`.
        timeout: seconds that a rank may be late.
        logger: told where the epoch cannot be gone on with.

    Raises:
        CheckpointError: on all ranks, when one cannot read its file.
    """
    same = saved_ranks == world_size()

    def restore() -> bool:
        saved = read_loop(path, saved_ranks)
        if saved is None:
            return False
        if same:
            set_rng_state(saved['rng'])
        if loop is None or saved['loop'] is None:
            return False
        loop.load_state_dict(saved['loop'])
        return True

    restored = agree('restore loop', restore, timeout, CheckpointError)
    if state.get('step') is not None and not restored:
        logger.warning(
            '%s was saved inside epoch %s, and this loop does not restore its position (pass '
            'loop= to save_checkpoint and load_checkpoint): the epoch is begun anew',
            path,
            state['epoch'],
        )
    elif not same:
        logger.info('%s: saved by %d ranks; random numbers are drawn anew', path, saved_ranks)
