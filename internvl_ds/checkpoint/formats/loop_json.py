"""What each rank's training loop goes on with: its generators, and its position in the epoch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_ds.checkpoint.formats.rng import require_rng_state, set_rng_state
from internvl_ds.checkpoint.formats.state_json import read_own
from internvl_ds.checkpoint.tag.manifest import LOOP_FILE
from internvl_ds.dist.rendezvous import agree, rank, world_size
from internvl_ds.errors import CheckpointError, brief
from internvl_ds.files.reading import interpreting


class SavedLoop:
    """What a tag keeps for this rank's loop; on other ranks than before, rank 0's."""

    def __init__(self, path: Path, saved_ranks: int) -> None:
        """Reads it, where the tag has it: not one of plain DeepSpeed, or of an earlier version.

        Args:
            path: the tag.
            saved_ranks: how many ranks saved it.

        Raises:
            CheckpointError: when the file cannot be read, is another rank's or another save's, or
                does not hold what belongs there.
        """
        self.path, self.saved_ranks, self.restored = path, saved_ranks, False
        self.same = saved_ranks == world_size()
        file = path / LOOP_FILE.format(rank() if self.same else 0)
        self._saved = read_own(path, file.name)
        if self._saved is not None:
            with interpreting(file, CheckpointError):
                if not isinstance(self._saved['loop'], Mapping | None):
                    raise TypeError(f'loop is {brief(self._saved["loop"])}')
                require_rng_state(self._saved['rng'])

    def restore_loop(self, loop: Any, timeout: float) -> None:
        """Restores ``loop``, before anything else is changed. Collective: every rank calls it.

        Raises:
            CheckpointError: on all ranks, when the loop of one does not take what was saved.
        """

        def restore() -> None:
            if self._saved is None or loop is None or self._saved['loop'] is None:
                return
            with interpreting(f'{self.path}: the state of the loop', CheckpointError):
                loop.load_state_dict(self._saved['loop'])
            self.restored = True

        agree('restore loop', restore, timeout, CheckpointError)

    def restore_generators(self, state: Mapping[str, Any], logger: logging.Logger) -> None:
        """Restores this rank's generators, at last; on other ranks than before they stay.

        Args:
            state: what the tag's state.json says.
            logger: told where the epoch cannot be gone on with.
        """
        if self.same and self._saved is not None:
            set_rng_state(self._saved['rng'])
        if state.get('step') is not None and not self.restored:
            logger.warning(
                f'{self.path} was saved inside epoch {state["epoch"]}, and this loop does not '
                'restore its position (pass loop= to save_checkpoint and load_checkpoint): the '
                'epoch is begun anew'
            )
        elif not self.same:
            ranks = self.saved_ranks
            logger.info(f'{self.path}: saved by {ranks} ranks; random numbers are drawn anew')
