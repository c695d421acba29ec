"""Ends a rank that waits in a collective for a rank that is dead.

gloo ends a collective when its connection to another rank breaks, which takes no time. But a child
of a rank that was killed keeps that connection open; and of some 80 ranks killed on a loaded host
one was still waited for after half a minute. COMM.TIMEOUT would end that wait, after half an hour.

On a GPU the collectives run apart from Python. The main thread stands where it next needs their
result, or room in the device's queue, and no exception comes: any place may be one of these.
"""

from __future__ import annotations

import _thread
import gc
import linecache
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

from internvl_ds.dist.group import current_group
from internvl_ds.dist.peers import rank
from internvl_ds.errors import RankError

logger = logging.getLogger(__name__)

# Seconds between two looks at the main thread, once a rank is dead.
_LOOK = 0.5
# Python calls its handler in the main thread; nothing uses it, and it does nothing by default.
_QUESTION = signal.SIGURG
# Of COMM.TIMEOUT, after which a rank says where it stands, and after which it ends the process, if
# NCCL has not.
_SHARE, _END_SHARE = 0.9, 1.1

# Where the innermost Python frame is while a collective runs.
_COLLECTIVES = tuple(
    os.path.join(*parts, '') for parts in (('torch', 'distributed'), ('deepspeed', 'comm'))
)
_OWN_WAITS = tuple(os.path.join('internvl_ds', room, '') for room in ('dist', 'checkpoint'))
_LIBRARIES = re.compile(r'\b(torch|deepspeed)\b')
# Through which DeepSpeed calls the handles of collectives that it waits for.
_WRAPPER = os.path.join('deepspeed', 'utils', 'nvtx')


def end_if_stranded(end: Callable[[], None]) -> None:
    """Watches, once a rank has died, whether this one's main thread waits for it in a collective.

    After COMM.DEAD_AFTER seconds in one place there it says so, as an exception that ends the
    process does, and calls ``end``. On a device in any place, but for this package's own waits. A
    rank that has left the process group in order is not dead.

    Args:
        end: ends the process; it has COMM.EXIT_TIMEOUT seconds.
    """
    group = current_group()
    heartbeat = group.heartbeat
    if heartbeat is None:
        return

    def watch() -> None:
        limit, on_device = group.limit('DEAD_AFTER'), _runs_on_device()
        seen, since = None, time.monotonic()
        while group.heartbeat is heartbeat:
            now = time.monotonic()
            frame = _main_frame()
            place = None if frame is None else (id(frame), frame.f_lasti)
            if place != seen:
                seen, since = place, now
            stood = now - since >= limit and heartbeat.lost(limit)
            if (
                frame
                and stood
                and (_stands_in_collective(frame) or (on_device and not _has_limit(frame)))
            ):
                reason = f'waited {limit:g} s in {_shown(frame)} for a rank that is dead'
                _say_and_end(reason, end)
            del frame  # it holds what its locals hold
            time.sleep(_LOOK)

    def begin() -> None:
        threading.Thread(target=watch, name='stranded', daemon=True).start()

    heartbeat.on_death = begin
    if heartbeat.lost(0):  # meanwhile
        begin()


def end_at_timeout(end: Callable[[], None]) -> None:
    """On a device: says before COMM.TIMEOUT is over where this rank stands, and who is silent.

    Then NCCL ends the process from a thread of its own, with the name of a collective only. Where
    it does not (TORCH_NCCL_ASYNC_ERROR_HANDLING 0), and the main thread stands in a collective or
    another rank is silent, this ends it; else a call of the program's own may be at work. Nothing
    is done where this is not the main thread, or the program handles SIGURG.

    Args:
        end: as for `end_if_stranded`.
    """
    may_ask = threading.current_thread() is threading.main_thread()
    if may_ask and _runs_on_device() and signal.getsignal(_QUESTION) == signal.SIG_DFL:
        answers: list[bool] = []
        signal.signal(_QUESTION, lambda number, frame: answers.append(True))
        args = (answers, end)
        threading.Thread(target=_watch_standing, args=args, name='standing', daemon=True).start()


def _runs_on_device() -> bool:
    from deepspeed.accelerator import get_accelerator  # takes a second, and nobody may die

    return get_accelerator().device_name() != 'cpu'


def _watch_standing(answers: list[bool], end: Callable[[], None]) -> None:
    """Asks the main thread again and again, which answers between two of its instructions."""
    group = current_group()
    heartbeat = group.heartbeat
    while group.heartbeat is heartbeat and heartbeat is not None:
        limit = group.limit('TIMEOUT')
        pause = min(10.0, limit / 50)
        time.sleep(pause)
        answers.clear()
        since = time.monotonic()
        _thread.interrupt_main(_QUESTION)  # sends no signal: no call in C is interrupted
        while not answers and time.monotonic() - since < _SHARE * limit:
            time.sleep(pause)
        frame = _main_frame()
        if answers or frame is None or group.heartbeat is not heartbeat:
            del frame  # it holds what its locals hold
            continue
        logger.warning(
            'rank %d has stood for %.3g s in %s; if that waits for a collective, COMM.TIMEOUT '
            '(%g s) ends it. %s',
            rank(), time.monotonic() - since, _shown(frame), limit,
            heartbeat.describe_silent() or 'All ranks answer: see in each log where it stands',
        )  # fmt: skip
        while not answers and time.monotonic() - since < _END_SHARE * limit:
            time.sleep(pause)
        silent = heartbeat.describe_silent()
        if not answers and (silent or _stands_in_collective(frame)):
            seconds, place = time.monotonic() - since, _shown(frame)
            reason = f'stood for {seconds:.3g} s in {place}, and COMM.TIMEOUT is {limit:g} s'
            _say_and_end('; '.join(filter(None, [reason, silent])), end)
        return


def _main_frame() -> FrameType | None:
    """Where the main thread is.

    Python before 3.12 makes the frames under a lock of the interpreter. A collection among them may
    let another thread run (torch's tensors do), which waits for that lock for ever: no thread of
    the process runs again.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames().get(threading.main_thread().ident or 0)
    finally:
        if collects:
            gc.enable()


def _say_and_end(reason: str, end: Callable[[], None]) -> None:
    limit = current_group().limit('EXIT_TIMEOUT')
    guard = threading.Timer(limit, os._exit, [1])
    guard.daemon = True
    guard.start()
    error = RankError(reason)
    sys.excepthook(RankError, error, None)
    sys.last_type, sys.last_value, sys.last_traceback = RankError, error, None  # for exit functions
    end()


def is_of_collective(error: BaseException) -> bool:
    """Whether a collective raised an error, or the error that it was made of."""
    cause: BaseException | None = error
    while cause is not None:
        for frame, line in traceback.walk_tb(cause.__traceback__):
            if _is_collective(frame, line) and _LIBRARIES.search(frame.f_code.co_filename):
                return True
        cause = cause.__cause__
    return False


def _has_limit(frame: FrameType) -> bool:
    """Whether this is a wait of this package, which ends by itself: a meeting, a save, the exit."""
    inner: FrameType | None = frame
    while inner is not None:
        if any(room in inner.f_code.co_filename for room in _OWN_WAITS):
            return True
        inner = inner.f_back
    return False


def _stands_in_collective(frame: FrameType) -> bool:
    """Whether a thread with this innermost frame may be waiting for other ranks."""
    while _WRAPPER in frame.f_code.co_filename and frame.f_back:
        frame = frame.f_back
    return _is_collective(frame, frame.f_lineno)


def _is_collective(frame: FrameType, line: int) -> bool:
    if any(folder in frame.f_code.co_filename for folder in _COLLECTIVES):
        return True
    # of a collective that was started before
    return re.search(r'\.wait\b', linecache.getline(frame.f_code.co_filename, line)) is not None


def _shown(frame: FrameType) -> str:
    """The function and line, of the program or DeepSpeed, that called the collective."""
    outer = frame
    while outer.f_back and any(folder in outer.f_code.co_filename for folder in _COLLECTIVES):
        outer = outer.f_back
    return f'{frame.f_code.co_name} ({outer.f_code.co_filename}:{outer.f_lineno})'
