"""Makes a forked child drop its copies of locks, connections and signal handlers."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Hashable

_actions: dict[Hashable, Callable[[], object]] = {}

_masks = threading.local()  # the signals that a thread which forks had blocked before


def at_fork(key: Hashable, action: Callable[[], object]) -> None:
    """Calls ``action`` once in each child that is forked before `forget`; the last added first.

    The child handles no signal before that.
    """
    _watch_forks()
    _actions[key] = action


def forget(key: Hashable) -> bool:
    """Removes the action of ``key``; returns whether there was one."""
    return _actions.pop(key, None) is not None


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_give_up)


def _block() -> None:
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _give_up() -> None:
    while _actions:
        _actions.popitem()[1]()
    _unblock()
