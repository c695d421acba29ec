"""One save at a time may finish in the background, on a thread; everything waits for it in order.

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

from internvl_ds.dist.peers import Peers, background_meetings, limit_of
from internvl_ds.dist.process_group import before_shutdown
from internvl_ds.dist.rendezvous import connect_peers, part_from
from internvl_ds.errors import CheckpointError

logger = logging.getLogger(__name__)


class _Save(threading.Thread):
    def __init__(self, name: str, action: Callable[[], None], limit: float) -> None:
        # A daemon: the interpreter would join others before the exit function below can report.
        super().__init__(name=f'save {name}', daemon=True)
        self.action, self.limit = action, limit
        self.error: Exception | None = None
        self.peers = connect_peers()

    def run(self) -> None:
        try:
            with background_meetings(self.peers):
                self.action()
        except Exception as error:
            self.error = error
            logger.error('%s failed: %s', self.name, error)


_pending: _Save | None = None

# Of the last save that was started, for the end of the program.
_peers: Peers | None = None

# Whether the end of the program waits for what is pending.
_ends_in_order = False


def start(name: str, action: Callable[[], None], limit: float) -> None:
    """Runs ``action`` in the background, where it may meet the other ranks' actions.

    Every rank must call it. The save before must have been waited for.

    Args:
        name: what is saved, for messages.
        action: writes, meets, commits.
        limit: seconds after which a `wait` gives up.
    """
    global _pending, _peers, _ends_in_order
    if not _ends_in_order:
        before_shutdown(_finish_before_shutdown)
        atexit.register(_finish_at_exit)
        _ends_in_order = True
    _pending = _Save(name, action, limit)
    _peers = _pending.peers
    _pending.start()


def is_pending() -> bool:
    """Whether a save was started that nobody has waited for yet."""
    return _pending is not None


def wait(limit: float | None = None) -> None:
    """Waits until nothing is saved in the background; returns at once when nothing is.

    Args:
        limit: seconds; None for the limit that the save was started with.

    Raises:
        CheckpointError: when it failed, or is not done in time. It is told once.
        RankError: when a rank did not come to the end of the save.
    """
    global _pending
    save, _pending = _pending, None
    if save is None:
        return
    limit = save.limit if limit is None else limit
    save.join(limit)
    if save.is_alive():
        _pending = save  # nothing may be saved beside it, nor its buffers be used again
        raise CheckpointError(f'{save.name}, in the background, was not done after {limit:g} s')
    if save.error is not None:
        raise save.error


def _finish_before_shutdown() -> None:
    global _peers
    _peers = None  # shutdown parts from the others by itself
    wait()


def _finish_at_exit() -> None:
    # sys.last_type is set when an exception is about to end the program.
    failing = hasattr(sys, 'last_type')
    try:
        # Other ranks may not come any more where an exception ends the program.
        wait(limit_of('EXIT_TIMEOUT') if failing else None)
        if _peers is not None and not failing:
            part_from(_peers)
    except Exception:
        # An exception here would be printed, and the exit status still be 0.
        sys.excepthook(*sys.exc_info())
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
