"""What a fork must not inherit: a child gives up its copies of locks, connections and signals."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable
from typing import NamedTuple


class _Actions(NamedTuple):
    in_child: Callable[[], object]
    before: Callable[[], object]
    in_parent: Callable[[], object]


_actions: dict[Hashable, _Actions] = {}


def at_fork(
    key: Hashable,
    in_child: Callable[[], object],
    before: Callable[[], object] = lambda: None,
    in_parent: Callable[[], object] = lambda: None,
) -> None:
    """Registers functions for the forks of this process, until `forget` is called with ``key``.

    Args:
        key: names them; a second registration replaces the first.
        in_child: called in the child, once: the last registered first.
        before, in_parent: called in the parent, in the thread that forks, before and after.
    """
    _watch_forks()
    _actions[key] = _Actions(in_child, before, in_parent)


def forget(key: Hashable) -> bool:
    """Removes the functions of ``key``; returns whether there were any."""
    return _actions.pop(key, None) is not None


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)


def _before() -> None:
    for actions in list(_actions.values()):
        actions.before()


def _in_parent() -> None:
    for actions in reversed(list(_actions.values())):
        actions.in_parent()


def _in_child() -> None:
    while _actions:
        _actions.popitem()[1].in_child()
