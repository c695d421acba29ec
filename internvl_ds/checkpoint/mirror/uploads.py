"""Uploads committed tags to a mirror, on a thread of each rank; meets nobody but at the end.

Rank 0 leads: it takes the newest tag that is still wanted and writes its manifest into the mirror.
A rank that sees the manifest there uploads its own files, then ``uploaded-RANK``. Rank 0 completes
the tag once all of these are there. Nothing that fails here ends a run.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from internvl_ds.checkpoint import async_save
from internvl_ds.checkpoint.mirror.jobs import Gone, Job, KeepUploading
from internvl_ds.checkpoint.mirror.places import Place, Retention, mark_complete, whole_places
from internvl_ds.checkpoint.mirror.store import Store
from internvl_ds.checkpoint.tag.manifest import FILE_NAME
from internvl_ds.checkpoint.tag.retention import Policy
from internvl_ds.config.mirror import mirror_of
from internvl_ds.config.tree import checkpoint_option
from internvl_ds.dist.group import current_group
from internvl_ds.dist.rendezvous import from_rank_0, rank, world_size
from internvl_ds.errors import CheckpointError, few
from internvl_ds.files.addresses import redacted

logger = logging.getLogger(__name__)

# Seconds from a failure to the next attempt: doubled up to the second. A client makes attempts of
# its own in each. After so many in a row the tag waits for the next save.
_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_ATTEMPTS = 10
# Seconds between two looks at what other ranks have done: the first, and the longest.
_LOOK, _LONGEST_LOOK = 0.2, 5.0
# Seconds that a commit waits at most for the numbers of the tags in the mirror.
_LIST_WAIT = 30.0


class _Uploads:
    """The uploads of one process group."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: list[Job] = []
        self._uploading: Place | None = None
        self._highest: int | None = None  # number of a save in the mirror; of rank 0
        self._thread: threading.Thread | None = None
        self._is_used = self._is_over = False
        self._turn = 0  # rises when jobs are to be looked at again
        self._address, self._wait, self._patience = '', 0.0, 0.0

    def begin(self, config: CfgNode) -> None:
        """Readies the uploads of a save. Collective: every rank calls it, in its main thread."""
        self._address = mirror_of(config)
        self._wait = float(checkpoint_option(config, 'MIRROR_WAIT'))
        self._patience = float(checkpoint_option(config, 'IO_TIMEOUT'))
        if self._address and self._thread is None:
            async_save.at_end(self._close)
            self._rank, self._ranks = rank(), world_size()
            self._thread = threading.Thread(target=self._run, name='mirror', daemon=True)
            self._thread.start()

    def next_sequence(self) -> int:
        """One more than the highest number of a save in the mirror; 0 where it is not known."""
        if not self._address:
            return 0
        with self._changed:
            self._changed.wait_for(lambda: self._highest is not None, _LIST_WAIT)
            if self._highest is None:
                logger.warning('%s: not listed after %g s: this save is not numbered after what '
                               'is there', redacted(self._address), _LIST_WAIT)  # fmt: skip
                self._highest = -1
            return self._highest + 1

    def saw(self, highest: int) -> None:
        """Notes the highest number of a save in the mirror."""
        with self._changed:
            known = -1 if self._highest is None else self._highest
            self._highest = max(highest, known)
            self._changed.notify_all()

    def held(self) -> Policy:
        """Keeps the tag that ranks upload now from being pruned."""
        place = self._uploading
        return KeepUploading(frozenset({place.tag} if place else ()))

    def submit(self, output: Path, place: Place, policies: Sequence[Policy] | None) -> None:
        """Has a committed tag uploaded. Every rank calls it, on any thread."""
        if not self._address:
            return
        with self._changed:
            self._jobs.append(Job(output, place, policies))
            self._is_used = True
            self._try_again()

    def finish(self) -> None:
        """Waits for uploads, CHECKPOINT.MIRROR_WAIT seconds at most; warns of what is left.
        Collective: every rank calls it.
        """
        if not self._is_used:
            return
        self._is_used = False

        def wait() -> None:
            deadline = time.monotonic() + self._wait
            with self._changed:
                self._try_again()
                # For no rank that has died: the meeting says so.
                while self._jobs and not current_group().dead_ranks():
                    if (seconds := deadline - time.monotonic()) <= 0:
                        break
                    self._changed.wait(min(seconds, _LONGEST_LOOK / 5))
                left = [job.path.name for job in self._jobs]
            if left:
                logger.warning(
                    f'{redacted(self._address)}: {few(left)} not uploaded when the run ends, after '
                    f'{self._wait:g} s more (CHECKPOINT.MIRROR_WAIT): only in OUTPUT'
                )

        # Another rank waits here for rank 0, and uploads meanwhile.
        from_rank_0('upload to the mirror', wait, self._wait + self._patience)
        with self._changed:
            self._jobs.clear()

    def _close(self) -> None:
        self.finish()
        with self._changed:
            self._is_over = True
            self._try_again()

    def _try_again(self) -> None:
        for job in self._jobs:
            job.failures = 0
        self._turn += 1
        self._changed.notify_all()

    def _rest(self, turn: int, seconds: float | None) -> bool:
        """Waits, at most so long, until jobs are to be looked at again; whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: self._turn != turn, seconds)

    def _run(self) -> None:
        async_save.step_back()
        store, look = None, _LOOK
        while not self._is_over:
            turn = self._turn
            try:
                if store is None:
                    store = Store(self._address)
                    retention = Retention(store)
                    _step_back_with(store)
                if self._highest is None and self._rank == 0:
                    self.saw(max((p.sequence for p in whole_places(store.names())), default=-1))
                job = self._next(store)
            except Exception as error:
                if self._rank == 0 and self._highest is None:
                    logger.warning(
                        f'{redacted(self._address)}: cannot be listed ({one_line(error)}): '
                        'training goes on, and uploads are tried after each save'
                    )
                    self.saw(-1)
                look = min(2 * look, _LONGEST_PAUSE)
                self._rest(turn, look)
                continue
            if job is not None:
                look = _LOOK
                self._attempt(store, retention, job)
            elif self._rest(turn, look if self._rank and self._jobs else None):
                look = _LOOK
            else:
                look = min(1.5 * look, _LONGEST_LOOK)

    def _next(self, store: Store) -> Job | None:
        """On rank 0 the newest tag that is wanted; on another rank one that rank 0 has begun."""
        with self._changed:
            jobs = sorted(self._jobs, key=lambda job: job.place.order, reverse=True)
        for job in (job for job in jobs if job.failures < _ATTEMPTS):
            if self._rank == 0 or store.has(f'{job.place.name}/{FILE_NAME}'):
                return job
            self._drop_if_gone(job)
        return None

    def _drop_if_gone(self, job: Job) -> None:
        try:
            job.manifest()
        except Gone:
            self._drop(job)

    def _drop(self, job: Job) -> None:
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
            self._changed.notify_all()

    def _attempt(self, store: Store, retention: Retention, job: Job) -> None:
        where = f'{redacted(store.address)}/{job.place.name}'
        try:
            self._uploading = job.place
            self._upload(store, job)
        except Gone:
            logger.info('%s: pruned or replaced before all of it was uploaded', job.path)
            self._drop(job)
        except Exception as error:
            self._failed(job, where, one_line(error))
        else:
            if self._rank == 0:
                logger.info('%s: uploaded to %s', job.path, where)
                self._prune(retention, job, where)
            self._drop(job)
        finally:
            self._uploading = None

    def _failed(self, job: Job, where: str, error: str) -> None:
        turn, job.failures = self._turn, job.failures + 1
        pause = min(_PAUSE * 2 ** (job.failures - 1), _LONGEST_PAUSE)
        logger.info('%s: attempt %d failed (%s)', where, job.failures, error)
        if not job.is_told:
            job.is_told = True
            logger.warning(
                f'{job.path}: rank {self._rank} cannot upload it to {where} ({error}): training '
                f'goes on; {_ATTEMPTS - 1} more attempts follow, and others after the next save'
            )
        self._rest(turn, pause)

    def _prune(self, retention: Retention, job: Job, where: str) -> None:
        with self._changed:
            pending = [other.place for other in self._jobs]
        try:
            self.saw(retention.prune(job.policies, pending))
        except Exception as error:
            logger.warning(f'{where}: older tags stay there for now ({one_line(error)})')

    def _upload(self, store: Store, job: Job) -> None:
        """Uploads this rank's files; on rank 0 also waits for the others, and completes the tag."""
        manifest = job.upload(store, self._rank, self._ranks)
        if self._rank != 0:
            return
        deadline, look = time.monotonic() + self._patience, _LOOK
        while missing := job.missing(store, self._ranks):
            if time.monotonic() > deadline:
                raise CheckpointError(f'{few(missing)} not there after {self._patience:g} s')
            time.sleep(look)
            look = min(1.5 * look, _LONGEST_LOOK)
        mark_complete(store, job.place, manifest)


def _step_back_with(store: Store) -> None:
    """Gives the client's own thread the priority of this one."""
    if store.loop is not None and sys.platform == 'linux':
        niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        store.loop.call_soon_threadsafe(os.setpriority, os.PRIO_PROCESS, 0, niceness)


def one_line(error: Exception) -> str:
    """An error of any client, in a line."""
    return redacted(' '.join(f'{type(error).__name__}: {error}'.split()))[:500]


def uploads() -> _Uploads:
    """The uploads of the process group."""
    return current_group().part(_Uploads)
