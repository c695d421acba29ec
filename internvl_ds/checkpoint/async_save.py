"""At most one save finishes on a background thread; the next save, load or exit waits for it.

The next save, a load, `internvl_ds.shutdown` and the end of the program wait, and hear of its
failure.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable

from internvl_ds.dist.group import current_group
from internvl_ds.dist.peers import background_meetings
from internvl_ds.dist.process_group import before_shutdown
from internvl_ds.dist.rendezvous import connect_peers, part_from
from internvl_ds.errors import CheckpointError

logger = logging.getLogger(__name__)

# What the copying and writing thread adds to its niceness: where ranks and loaders leave no core
# free, training goes first.
_NICENESS = 10


class _Save(threading.Thread):
    def __init__(
        self, name: str, action: Callable[[], None], hurry: Callable[[], None], limit: float
    ) -> None:
        # A daemon: the interpreter would join others before `_Saves.at_exit` can report.
        super().__init__(name=f'save {name}', daemon=True)
        self.action, self.hurry, self.limit = action, hurry, limit
        self.error: Exception | None = None
        self.peers = connect_peers()

    def run(self) -> None:
        step_back()
        try:
            with background_meetings(self.peers):
                self.action()
        except Exception as error:
            self.error = error
            logger.error('%s failed: %s', self.name, error)


def step_back() -> None:
    """Lowers the priority of this thread alone, where the system has one for each thread."""
    if sys.platform == 'linux':
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)


class _Saves:
    """The saves of one process group: what is pending, and what was started last."""

    pending: _Save | None = None
    last: _Save | None = None

    def __init__(self) -> None:
        self.endings: list[Callable[[], None]] = []
        self.is_registered = False

    def register(self) -> None:
        if not self.is_registered:
            self.is_registered = True
            before_shutdown(self.at_shutdown)
            atexit.register(self.at_exit)

    def start(self, save: _Save) -> None:
        self.register()
        self.pending = self.last = save
        save.start()

    def wait(self, limit: float | None = None) -> None:
        save, self.pending = self.pending, None
        if save is None:
            return
        limit = save.limit if limit is None else limit
        save.hurry()
        save.join(limit)
        if save.is_alive():
            self.pending = save  # nothing may be saved beside it, nor its buffers be used again
            raise CheckpointError(f'{save.name}, in the background, was not done after {limit:g} s')
        if save.error is not None:
            raise save.error

    def at_shutdown(self) -> None:
        if self.last is not None:
            self.last.peers = None  # shutdown itself parts from the others
        self.wait()
        for ending in self.endings:
            ending()

    def at_exit(self) -> None:
        # sys.last_type is set when an exception is about to end the program.
        failing = hasattr(sys, 'last_type')
        try:
            # Other ranks may not come any more where an exception ends the program.
            self.wait(current_group().limit('EXIT_TIMEOUT') if failing else None)
            for ending in () if failing else self.endings:
                ending()
            if self.last is not None and self.last.peers is not None and not failing:
                part_from(self.last.peers)
        except Exception:
            # An exception here would be printed, and the exit status still be 0.
            sys.excepthook(*sys.exc_info())
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


def start(name: str, action: Callable[[], None], hurry: Callable[[], None], limit: float) -> None:
    """Runs ``action`` in the background. Collective: every rank calls it.

    It may meet the other ranks' actions. The save before must have been waited for.

    Args:
        name: what is saved, for messages.
        action: writes, meets, commits.
        hurry: called when somebody waits for it.
        limit: seconds after which a `wait` gives up.
    """
    current_group().part(_Saves).start(_Save(name, action, hurry, limit))


def at_end(ending: Callable[[], None]) -> None:
    """Has ``ending`` called after the last save, by `internvl_ds.shutdown` or the program's end.

    Every rank calls it, and it may meet the other ranks' endings. Not where an exception ends the
    program.
    """
    saves = current_group().part(_Saves)
    saves.register()
    saves.endings.append(ending)


def is_pending() -> bool:
    """Whether a background save was started and not waited for yet."""
    return current_group().part(_Saves).pending is not None


def is_running() -> bool:
    """Whether a background save of this rank works still."""
    save = current_group().part(_Saves).pending
    return save is not None and save.is_alive()


def wait(limit: float | None = None) -> None:
    """Waits for the background save; returns at once if there is none.

    Args:
        limit: seconds; None for the limit that the save was started with.

    Raises:
        CheckpointError: when it failed, or is not done in time; raised once.
        RankError: when a rank did not come to the end of the save.
    """
    current_group().part(_Saves).wait(limit)
