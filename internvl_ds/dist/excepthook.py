"""Prints one line if an exception ends a rank: which rank, where, why, and who else is gone."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from internvl_ds.dist.group import current_group
from internvl_ds.errors import InternvlDsError, Preempted, RankError, printable

logger = logging.getLogger('internvl_ds')

# Seconds for what rank 0 said last to be read here.
_HEARD = 0.5


def speak_on_exceptions(
    rank: int | None,
    afterwards: Callable[[], None] | None = None,
    patience: float = 0.0,
    *,
    joined: bool = False,
) -> None:
    """Makes an exception that ends this process print one line, after its traceback.

    Errors that this package raises on purpose, and Ctrl-C, have no traceback.

    It is called again once the process group is there: torch then puts a hook of its own around
    those before, which holds back what they print until they return.

    Args:
        rank: this process's; None where it is not known yet.
        afterwards: called last.
        patience: seconds left to the launcher to end a job of which other ranks are gone.
        joined: all ranks have met: one rank speaks for all, and names the ranks that are gone.
    """
    before = sys.excepthook

    def speak(kind: Any, value: Any, traceback: Any) -> None:
        group = current_group()
        if group.hook is not speak:
            before(kind, value, traceback)
            return
        follows = _follows(value)
        time.sleep(patience if follows else 0.0)
        heartbeat = group.heartbeat if joined and follows else None
        clause = heartbeat.describe_silent() if heartbeat else ''
        speaks = not group.over and (not joined or _may_speak(not follows))
        group.over = True
        traces = group.traces or logger.isEnabledFor(logging.DEBUG)
        is_ours = isinstance(value, InternvlDsError | Preempted | KeyboardInterrupt)
        if traces or (speaks and not is_ours):
            before(kind, value, traceback)
        if speaks:
            reason = f'{kind.__name__}: {one_line(value)}' if str(value) else kind.__name__
            text = printable('; '.join(filter(None, [clause, reason])))
            who = 'a rank' if rank is None else f'rank {rank}'
            line = f'{who} on {socket.gethostname()} ends the job: {text}'
            with contextlib.suppress(OSError):  # the terminal is gone
                print(line, file=sys.stderr, flush=True)
        if afterwards is not None:
            afterwards()
        # Python's last collection looks at all that torch and DeepSpeed made, for seconds of CPU
        # time, while the launcher and the other ranks wait for this one to be gone.
        gc.freeze()

    sys.excepthook = current_group().hook = speak


def _may_speak(is_cause: bool) -> bool:
    """Whether this rank is the first to report why the job ends; then it must.

    Args:
        is_cause: False for what other ranks see of an error: after a cause it is not said.
    """
    group = current_group()
    if group.peers is None or group.heartbeat is None:
        return True
    kind, place = 'cause' if is_cause else 'effect', group.key('last words')

    def claim(store: Any) -> bool:
        is_first = store.add(f'{place}/{kind}', 1) == 1
        is_free = not store.check([place])
        store.set(place, kind)
        return is_first and (is_cause or is_free)

    # A rank 0 that is silent already is not waited for.
    limit = 0 if group.heartbeat.rank_0_is_silent() else group.limit('SILENT_AFTER')
    try:
        speaks = bool(group.peers.client.call(claim, limit))
    except RankError:  # the words of rank 0 may have come before its end
        time.sleep(_HEARD)
        words = group.heartbeat.words
        speaks = not words or (is_cause and words == 'effect')
    if speaks:
        group.heartbeat.speak(kind)
    return speaks


def one_line(error: BaseException) -> str:
    """An error's text, without the traceback that a DataLoader puts in front of a worker's."""
    text = str(error)
    if 'Original Traceback (most recent call last)' in text:
        # Its last part: indented lines of code, then the error's name and text.
        lines = text.rpartition('Traceback (most recent call last):\n')[2].splitlines()
        lines = list(itertools.dropwhile(lambda line: line.startswith(' '), lines))
        text = ' '.join(lines).partition(': ')[2] or text
    return ' '.join(text.split())


def _follows(error: BaseException) -> bool:
    """Whether the error is a consequence of another rank's end."""
    torch_dist = sys.modules.get('torch.distributed')  # without it no error is of it
    is_of_ranks = isinstance(error, RankError | getattr(torch_dist, 'DistError', RankError))
    return is_of_ranks or (isinstance(error, RuntimeError) and 'gloo' in str(error))
