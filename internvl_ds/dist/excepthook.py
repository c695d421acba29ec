"""What a rank says when an exception ends it: which rank, where, why, and who else is gone."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as torch_dist

from internvl_ds.errors import InternvlDsError, Preempted, RankError, printable

logger = logging.getLogger('internvl_ds')

# The hook that speaks; those under it only print the traceback.
_outermost: Callable[..., None] | None = None

# Whether TRAIN.TRACEBACK asks for the traceback of every error.
_always_traces = False

# Whether this process has come to its last words: what fails after them, at its exit, is no cause.
_over = False


def speak_on_exceptions(
    rank: int | None,
    silent: Callable[[], str] | None = None,
    may_speak: Callable[[bool], bool] | None = None,
    afterwards: Callable[[], None] | None = None,
    patience: float = 0.0,
) -> None:
    """Has an exception that ends this process be told in one line, after its traceback.

    Errors that this package raises on purpose, and Ctrl-C, have no traceback.

    To be called again once the process group is there: torch then puts a hook of its own around
    those before, which keeps what they print until they return.

    Args:
        rank: this process's; None where it is not known yet.
        silent: tells of ranks that do not answer, or ''; asked where a collective failed.
        may_speak: whether no rank has said anything yet; told whether this one's is a cause, and
            not what other ranks see of it.
        afterwards: called last.
        patience: seconds left to the launcher to end a job of which other ranks are gone.
    """
    global _outermost
    before = sys.excepthook

    def speak(kind: Any, value: Any, traceback: Any) -> None:
        global _over
        if _outermost is not speak:
            before(kind, value, traceback)
            return
        follows = _follows(value)
        time.sleep(patience if follows else 0.0)
        others = silent() if silent is not None and follows else ''
        speaks = not _over and (may_speak is None or may_speak(not follows))
        _over = True
        if wants_traceback() or (speaks and not _is_expected(value)):
            before(kind, value, traceback)
        if speaks:
            reason = f'{kind.__name__}: {one_line(value)}' if str(value) else kind.__name__
            text = '; '.join([others, reason] if others else [reason])
            with contextlib.suppress(OSError):  # the terminal is gone
                who = 'a rank' if rank is None else f'rank {rank}'
                where = f'{who} on {socket.gethostname()}'
                print(f'{where} ends the job: {printable(text)}', file=sys.stderr, flush=True)
        if afterwards is not None:
            afterwards()

    sys.excepthook = _outermost = speak


def trace_all(wanted: bool) -> None:
    """Has the tracebacks of expected errors printed as well, or not: TRAIN.TRACEBACK."""
    global _always_traces
    _always_traces = wanted


def wants_traceback() -> bool:
    """Whether the traceback of an error is to be printed that is told in one line otherwise."""
    return _always_traces or logger.isEnabledFor(logging.DEBUG)


def one_line(error: BaseException) -> str:
    """An error's text, without the traceback that a DataLoader puts in front of a worker's."""
    text = str(error)
    if 'Original Traceback (most recent call last)' in text:
        # Its last part: indented lines of code, then the error's name and text.
        lines = text.rpartition('Traceback (most recent call last):\n')[2].splitlines()
        lines = list(itertools.dropwhile(lambda line: line.startswith(' '), lines))
        text = ' '.join(lines).partition(': ')[2] or text
    return ' '.join(text.split())


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, InternvlDsError | Preempted | KeyboardInterrupt)


def _follows(error: BaseException) -> bool:
    """Whether this is what the end of another rank looks like."""
    known = isinstance(error, torch_dist.DistError | RankError)
    return known or (isinstance(error, RuntimeError) and 'gloo' in str(error))
