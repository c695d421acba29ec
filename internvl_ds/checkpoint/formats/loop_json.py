"""The state of each rank's training loop: random generators, and position in the epoch."""

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
    """The loop state in a tag for this rank; with another number of ranks, rank 0's."""

    def __init__(self, path: Path, saved_ranks: int) -> None:
        """Reads the state; tags of plain DeepSpeed and of earlier versions have none.

        ``saved_ranks``: how many ranks saved the tag. CheckpointError for a file of another rank or
        save, and for what does not belong there.
        """
        self.path, self.saved_ranks, self.is_restored = path, saved_ranks, False
        self.has_same_ranks = saved_ranks == world_size()
        file = path / LOOP_FILE.format(rank() if self.has_same_ranks else 0)
        self._state = read_own(path, file.name)
        if self._state is not None:
            with interpreting(file, CheckpointError):
                if not isinstance(self._state['loop'], Mapping | None):
                    raise TypeError(f'loop is {brief(self._state["loop"])}')
                require_rng_state(self._state['rng'])

    def restore_loop(self, loop: Any, timeout: float) -> None:
        """Restores ``loop``, before anything else is changed. Collective: every rank calls it.

        CheckpointError on all ranks, when the loop of one does not take what was saved.
        """

        def restore() -> None:
            if self._state is None or loop is None or self._state['loop'] is None:
                return
            with interpreting(f'{self.path}: the state of the loop', CheckpointError):
                loop.load_state_dict(self._state['loop'])
            self.is_restored = True

        agree('restore loop', restore, timeout, CheckpointError)

    def restore_generators(self, state: Mapping[str, Any], logger: logging.Logger) -> None:
        """Restores this rank's generators, as the last step; not with another number of ranks.

        ``state`` is the tag's state.json; a warning says where its epoch is begun anew.
        """
        if self.has_same_ranks and self._state is not None:
            set_rng_state(self._state['rng'])
        if state.get('step') is not None and not self.is_restored:
            logger.warning(
                f'{self.path} was saved inside epoch {state["epoch"]}, and this loop does not '
                'restore its position (pass loop= to save_checkpoint and load_checkpoint): the '
                'epoch is begun anew'
            )
        elif not self.has_same_ranks:
            ranks = self.saved_ranks
            logger.info(f'{self.path}: saved by {ranks} ranks; random numbers are drawn anew')
