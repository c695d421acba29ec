"""What a disk may hold after a power cut, at every moment of a recorded piece of work.

A kill loses nothing that the kernel has; a power cut loses what was not flushed. `Recorder` watches
a directory while code runs, and `states` gives every content of it that a file system which keeps
no order may leave: it promises only what POSIX does. The data of a file is on disk after fsync of
that file, a name after fsync of the directory that holds it, and a rename is done or not done.
"""

from __future__ import annotations

import itertools
import os
import random
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# Calls after which the names in a directory may be others.
_NAME_CALLS = {
    os.open, os.rename, os.replace, os.unlink, os.remove, os.mkdir, os.rmdir, os.link, os.symlink,
}  # fmt: skip
# With more changes of names than these, their subsets are drawn.
_ALL_SUBSETS = 5
_DRAWN = 24

# Relative path -> content; None for a directory.
Tree = dict[str, bytes | None]


class Change(NamedTuple):
    """A change of names in one directory: done as a whole, or not.

    Attributes:
        folder: the inode of the directory.
        gone, new: the name that goes, and the one that comes; or None.
        inode: what has the new name.
    """

    folder: int
    gone: str | None
    new: str | None
    inode: int = 0


class Event(NamedTuple):
    """A call that orders work on the disk.

    Attributes:
        call: 'fsync', 'rename', 'create', 'unlink'; or a word of `Recorder.note`.
        path: relative to the watched directory; of a rename the new name.
        was: of a rename, the old name.
    """

    call: str
    path: str
    was: str = ''


@dataclass
class _Moment:
    """What is in memory and on disk after an event."""

    events: int
    data: dict[int, bytes]  # of the files, as the kernel has it
    flushed: dict[int, bytes]  # the same on disk
    names: dict[int, dict[str, int]]  # of the directories, on disk
    pending: list[Change]


@dataclass
class Recorder:
    """Watches a directory: ``with Recorder(path): ...``. What is in it before is on disk.

    Attributes:
        root: the directory.
        events: in their order.
    """

    root: Path
    events: list[Event] = field(default_factory=list)
    _moments: list[_Moment] = field(default_factory=list)
    _open: dict[int, int] = field(default_factory=dict)  # inode -> descriptor, so none is reused
    _is_folder: dict[int, bool] = field(default_factory=dict)
    _names: dict[int, dict[str, int]] = field(default_factory=dict)  # as the kernel has them
    _paths: dict[int, str] = field(default_factory=dict)
    _flushed: dict[int, bytes] = field(default_factory=dict)
    _disk: dict[int, dict[str, int]] = field(default_factory=dict)
    _pending: list[Change] = field(default_factory=list)
    _patch: pytest.MonkeyPatch = field(default_factory=pytest.MonkeyPatch)

    def __enter__(self) -> Recorder:
        self._fsync = os.fsync
        self._names = self._scan()
        self._disk = {inode: dict(names) for inode, names in self._names.items()}
        self._flushed = self._data()
        self._keep()
        self._patch.setattr(os, 'fsync', self._flush)
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self._look()
        self._patch.undo()
        for descriptor in self._open.values():
            os.close(descriptor)

    def note(self, word: str) -> None:
        """Puts a word of the test among the events."""
        self._look()
        self._add(Event(word, ''))

    def states(self, seed: int = 0) -> Iterator[tuple[int, Tree]]:
        """Every content that the directory may have after a power cut, each once.

        Yields:
            How many events came before it at most, and the content.
        """
        drawn, seen = random.Random(seed), set()
        for moment in reversed(self._moments):
            for changes in _subsets(moment.pending, drawn):
                names = {inode: dict(entries) for inode, entries in moment.names.items()}
                for change in changes:
                    _apply(names.setdefault(change.folder, {}), change)
                for data in _left_data(moment):
                    tree = dict(self._tree(names, data))
                    key = frozenset(tree.items())
                    if key not in seen:
                        seen.add(key)
                        yield moment.events, tree

    def unflushed(self, name: str) -> list[str]:
        """What a directory below the root held in memory only when it got its present name."""
        index = next(i for i, e in enumerate(self.events) if e.path == name and e.call == 'rename')
        moment = self._moments[index]
        folder = self._names[self._inode(self.root)][name]
        dirty = []
        for change in moment.pending:
            if change.folder == folder and change.new is not None:
                dirty.append(f'the name {change.new}')
        for entry, inode in self._names[folder].items():
            if moment.data.get(inode) != moment.flushed.get(inode):
                dirty.append(f'the data of {entry}')
        return dirty

    def _profile(self, frame: Any, event: str, function: Any) -> None:
        if event == 'c_return' and function in _NAME_CALLS:
            self._look()

    def _flush(self, descriptor: int) -> None:
        self._look()
        self._fsync(descriptor)
        inode = os.fstat(descriptor).st_ino
        if inode not in self._open:
            return
        if self._is_folder[inode]:
            self._disk[inode] = dict(self._names.get(inode, {}))
            self._pending = [change for change in self._pending if change.folder != inode]
        else:
            self._flushed[inode] = self._data()[inode]
        self._add(Event('fsync', self._paths.get(inode, '')))

    def _look(self) -> None:
        """Notes what has changed among the names since the last look."""
        sys.setprofile(None)
        now = self._scan()
        self._keep()
        for folder in now.keys() | self._names.keys():
            before, after = self._names.get(folder, {}), now.get(folder, {})
            self._compare(folder, before, after)
        self._names = now
        if self._patch_is_on():
            sys.setprofile(self._profile)

    def _compare(self, folder: int, before: dict[str, int], after: dict[str, int]) -> None:
        where = self._paths.get(folder, '')
        gone = {inode: name for name, inode in before.items() if after.get(name) != inode}
        for name, inode in after.items():
            if before.get(name) == inode:
                continue
            was = gone.pop(inode, None)
            gone.pop(before.get(name, -1), None)  # a rename over it
            self._pending.append(Change(folder, was, name, inode))
            call = 'create' if was is None else 'rename'
            self._add(Event(call, _join(where, name), '' if was is None else _join(where, was)))
        for name in gone.values():
            self._pending.append(Change(folder, name, None))
            self._add(Event('unlink', _join(where, name)))

    def _add(self, event: Event) -> None:
        self.events.append(event)
        names = {inode: dict(entries) for inode, entries in self._disk.items()}
        self._moments.append(
            _Moment(len(self.events), self._data(), dict(self._flushed), names, list(self._pending))
        )

    def _patch_is_on(self) -> bool:
        return os.fsync == self._flush

    def _inode(self, path: Path) -> int:
        return os.stat(path).st_ino

    def _scan(self) -> dict[int, dict[str, int]]:
        """The names of each directory, as the kernel has them."""
        found: dict[int, dict[str, int]] = {}
        pending = [(self.root, '')]
        while pending:
            folder, path = pending.pop()
            inode = self._inode(folder)
            self._remember(inode, folder, path, True)
            found[inode] = {}
            with os.scandir(folder) as entries:
                for entry in entries:
                    number, below = entry.inode(), _join(path, entry.name)
                    found[inode][entry.name] = number
                    if entry.is_dir(follow_symlinks=False):
                        pending.append((Path(entry.path), below))
                    else:
                        self._remember(number, Path(entry.path), below, False)
        return found

    def _remember(self, inode: int, where: Path, path: str, is_folder: bool) -> None:
        self._paths[inode] = path
        if inode not in self._open:
            self._open[inode] = os.open(where, os.O_RDONLY)
            self._is_folder[inode] = is_folder

    def _keep(self) -> None:
        for inode, is_folder in self._is_folder.items():
            if is_folder:
                self._disk.setdefault(inode, {})

    def _data(self) -> dict[int, bytes]:
        found = {}
        for inode, descriptor in self._open.items():
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                found[inode] = os.pread(descriptor, 1 << 24, 0)
        return found

    def _tree(
        self, names: dict[int, dict[str, int]], data: dict[int, bytes]
    ) -> Iterator[tuple[str, bytes | None]]:
        pending = [(self._inode(self.root), '')]
        while pending:
            folder, path = pending.pop()
            for name, inode in names.get(folder, {}).items():
                below = _join(path, name)
                if self._is_folder[inode]:
                    pending.append((inode, below))
                    yield below, None
                else:
                    yield below, data.get(inode, b'')


def write_tree(tree: Tree, root: Path) -> None:
    """Makes a directory of that content."""
    root.mkdir()
    for path in sorted(tree):
        data = tree[path]
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def _subsets(changes: list[Change], drawn: random.Random) -> Iterable[list[Change]]:
    """Those that may have come to disk; where there are many: the first n, the last n, and some."""
    if len(changes) <= _ALL_SUBSETS:
        for flags in itertools.product((False, True), repeat=len(changes)):
            yield list(itertools.compress(changes, flags))
        return
    for count in range(len(changes) + 1):
        yield changes[:count]
        yield changes[count:]
    for _ in range(_DRAWN):
        yield [change for change in changes if drawn.random() < 0.5]


def _apply(entries: dict[str, int], change: Change) -> None:
    if change.gone is not None:
        entries.pop(change.gone, None)
    if change.new is not None:
        entries[change.new] = change.inode


def _left_data(moment: _Moment) -> Iterator[dict[int, bytes]]:
    """What files may hold: all of what was written, what was flushed, half of it, or zeros."""
    dirty = [i for i, data in moment.data.items() if moment.flushed.get(i) != data]
    flushed = {i: moment.flushed.get(i, b'') for i in dirty}
    ways: list[Callable[[int], bytes]] = [
        lambda i: moment.data[i],
        lambda i: flushed[i],
        lambda i: moment.data[i][: len(moment.data[i]) // 2],
        lambda i: bytes(len(moment.data[i])),
    ]
    for way in ways if dirty else ways[:1]:
        yield {**moment.data, **{i: way(i) for i in dirty}}
    for one in dirty if len(dirty) > 1 else ():
        yield {**moment.data, one: flushed[one]}


def _join(folder: str, name: str) -> str:
    return f'{folder}/{name}' if folder else name
