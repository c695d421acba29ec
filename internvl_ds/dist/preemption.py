"""Saves, or saves and stops, at the same update on all ranks, if any rank is asked to.

A scheduler that takes a host back sends SIGTERM or SIGUSR1, to some ranks or to all, at moments
that differ between them; Ctrl-C sends SIGINT, and a terminal that is closed SIGHUP. Ranks that
stopped at different updates would wait for each other.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import socket
import threading
import time
from pathlib import Path

from yacs.config import CfgNode

from internvl_ds.config.tree import checkpoint_option, get_option
from internvl_ds.dist.group import current_group
from internvl_ds.dist.peers import background_meetings, rank
from internvl_ds.dist.rendezvous import connect_peers, exchange, raise_request, request_is_raised
from internvl_ds.dist.signals import Request
from internvl_ds.errors import Preempted as Preempted
from internvl_ds.errors import RankError, few
from internvl_ds.files import write_text

logger = logging.getLogger(__name__)

SAVE, STOP = 'save', 'stop'

# Seconds between two looks at what was asked for.
_INTERVAL = 1.0


class Preemption:
    """Tells all ranks at the same boundary that they are to save, or to save and stop.

    A boundary is a place in the program that every rank passes in the same order: after an update,
    or after a batch of an evaluation. Stopping is asked for by SIGTERM, SIGUSR1, SIGINT or SIGHUP
    to any rank (the last two stay ignored where they were before), or by the file that the launch
    scripts make (INTERNVL_DS_RESULT with ``.stop`` behind it); saving by ``save_every``. No
    boundary costs a collective: a thread of each rank looks for a request in rank 0's store, and
    only then do these threads agree on a boundary that no rank has passed. SIGINT to a rank that
    was asked more than a second before ends it at once, with exit status 130.

        with Preemption(config) as preemption:
            for batch in loader:
                ...  # forward, backward, update
                if preemption.reached() == STOP:
                    save_checkpoint(...)
                    sys.exit(config.TRAIN.PREEMPT_EXIT_CODE)

    Every rank makes one, in its main thread, and leaves the ``with`` block; where no exception ends
    it the ranks wait there for each other. The previous signal handlers are restored after it,
    unless the program is about to end (SystemExit): then a late one must not spoil that.

    Attributes:
        save_every: seconds from a save to the next, from TRAIN.SAVE_MINUTES; None: no save. Rank
            0's alone counts, and it may be set while the run goes on.
    """

    def __init__(self, config: CfgNode) -> None:
        """Takes the signals over.

        Args:
            config: TRAIN.SAVE_MINUTES and CHECKPOINT.RENDEZVOUS_TIMEOUT (seconds that a rank may
                need longer than another to come to a boundary) are read.
        """
        minutes = get_option(config, 'TRAIN.SAVE_MINUTES')
        self.save_every: float | None = 60 * minutes if minutes > 0 else None
        self._timeout = checkpoint_option(config, 'RENDEZVOUS_TIMEOUT')
        result = os.environ.get('INTERNVL_DS_RESULT')
        self._file: Path | None = None
        if result and rank() == 0:
            write_text(Path(result), 'training\n')
            self._file = Path(f'{result}.stop')
        self._last_save = time.monotonic()
        self._condition = threading.Condition()
        # The following are about the request that is being agreed on.
        self._boundaries = 0  # that this rank has passed
        self._limit: int | None = None  # the boundary that must not be passed before it is settled
        self._target: int | None = None  # the boundary to act at
        self._action: str | None = None
        self._error: Exception | None = None
        # Tells its requests from those of the next Preemption; the same on all ranks.
        rounds = current_group().rounds
        self._number = rounds['preemption']
        rounds['preemption'] += 1
        self._closing = threading.Event()
        self._peers = connect_peers()
        self._request = Request()
        self._thread = threading.Thread(target=self._watch, name='preemption', daemon=True)
        if self._peers is not None:
            self._thread.start()
            # A thread inside the store when the interpreter is torn down can abort the process.
            atexit.register(self._stop_watching)

    def __enter__(self) -> Preemption:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._peers is not None:
            # While one rank may still come to a boundary, the others' threads must answer it.
            exchange('end of training', None, self._timeout)
        self._stop_watching()
        if kind is None or not issubclass(kind, Preempted | SystemExit):
            self._request.release()

    def reached(self) -> str | None:
        """Passes a boundary: None, or SAVE or STOP, the same on all ranks.

        Collective: every rank calls it, at every boundary.

        Raises:
            RankError: when a request could not be agreed on; the ranks that did not answer are
                named.
        """
        if self._peers is None:
            action = self._wish()
            if action == STOP:
                self._announce([self._reason()])
            return action
        with self._condition:
            self._boundaries += 1
            if not self._condition.wait_for(self._may_pass, 2 * self._timeout):
                raise RankError(
                    f'rank {rank()} waited {2 * self._timeout:g} s for the others to agree on '
                    'where to save'
                )
            if self._error is not None:
                raise self._error
            if self._target != self._boundaries:
                return None
            action, self._action, self._target, self._limit = self._action, None, None, None
            self._last_save = time.monotonic()
            self._condition.notify_all()
        return action

    def _may_pass(self) -> bool:
        undecided = self._limit == self._boundaries and self._target is None
        return not undecided or self._error is not None

    def saved(self) -> None:
        """Counts ``save_every`` from now."""
        self._last_save = time.monotonic()

    def _stop_watching(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_INTERVAL)

    def _wish(self) -> str | None:
        """The request to this rank itself."""
        if self._request.signal is not None or (self._file is not None and self._file.exists()):
            return STOP
        every = self.save_every
        due = every is not None and time.monotonic() - self._last_save > every
        return SAVE if due and rank() == 0 else None

    def _watch(self) -> None:
        """The thread: answers one request after another."""
        assert self._peers is not None
        requests = (f'boundary {self._number}.{count}' for count in itertools.count())
        request = next(requests)
        try:
            with background_meetings(self._peers):
                while not self._closing.wait(_INTERVAL):
                    wish = self._wish()
                    if wish is not None:
                        raise_request(request, self._peers)
                    elif not request_is_raised(request, self._peers, self._timeout):
                        continue
                    if self._agree(request, wish) == STOP:
                        return
                    request = next(requests)
        except Exception as error:
            if self._closing.is_set():  # the program ends, and nobody waits for this thread
                return
            with self._condition:
                self._error = error
                self._condition.notify_all()

    def _agree(self, request: str, wish: str | None) -> str:
        """Settles a request with the other ranks' threads; waits until this rank has acted."""
        with self._condition:
            boundary = self._boundaries
            self._limit = boundary + 1
        who = self._reason() if wish == STOP else ''
        answers = exchange(request, [boundary, wish, who], self._timeout)
        reasons = [reason for _, _, reason in answers if reason]
        action = STOP if any(wish == STOP for _, wish, _ in answers) else SAVE
        if action == STOP:
            self._announce(reasons)
        with self._condition:
            # No rank has passed this one: each waits for the answer at the first after its own.
            self._target, self._action = 1 + max(number for number, _, _ in answers), action
            self._condition.notify_all()
            while self._target is not None and not self._closing.is_set():
                self._condition.wait(1.0)
        return action

    def _announce(self, reasons: list[str]) -> None:
        logger.info(
            'all ranks save and stop at the next boundary: %s; SIGINT (Ctrl-C) now ends at once',
            few(reasons),
        )
        self._request.know()

    def _reason(self) -> str:
        signal = self._request.signal
        what = signal.name if signal is not None else 'the launch script was asked to stop'
        return f'rank {rank()} on {socket.gethostname()} ({what})'
