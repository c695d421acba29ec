"""Small tags with a mirror, without an engine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from internvl_ds.checkpoint.mirror import store as stores
from internvl_ds.checkpoint.mirror.places import Place, whole_places
from internvl_ds.checkpoint.mirror.store import Store
from internvl_ds.checkpoint.mirror.uploads import _Uploads, uploads
from internvl_ds.checkpoint.tag import commit
from internvl_ds.checkpoint.tag.discovery import read_header
from internvl_ds.checkpoint.tag.hashing import write_hashed
from internvl_ds.checkpoint.tag.manifest import Manifest, tag_name
from tests.harness.model import make_config
from tests.harness.tags import make_header

# Of two ranks.
FILES = ('a.bin', 'under/b.bin', 'loop_rank_1.json.bin')


def save(output: Path, epoch: int, best: str | None = None, size: int = 3000, **more: Any) -> Path:
    """Saves a tag of three files, the way `save_checkpoint` does."""
    tag = tag_name(epoch, best)
    staging = commit.begin(output, tag)
    files = {}
    for name in FILES:
        path = staging.path / name
        path.parent.mkdir(exist_ok=True)
        content = f'{tag} {name} {more}'.encode() * size
        files[name] = write_hashed(path, lambda file, content=content: file.write(content))
    sequence = max(commit.next_sequence(output), uploads().next_sequence())
    header = make_header(tag, epoch, sequence, save=staging.save, **more)
    return commit.commit(staging, Manifest(header, files), latest=best is None)


def config_of(output: Path, address: str, **more: Any) -> Any:
    """A configuration with a mirror."""
    return make_config(str(output), CHECKPOINT__MIRROR=address, **more)


def place_of(tag: Path) -> Place:
    """Of a tag of `save`."""
    header = read_header(tag)
    return Place(header.sequence, header.tag, header.save)


def whole(address: str) -> list[str]:
    """The tags that count in a mirror, oldest first."""
    return [place.tag for place in whole_places(Store(address).names())]


def upload(output: Path, address: str, *tags: Path, policies: Any = None, wait: float = 60) -> None:
    """Uploads tags, one after the other, on one rank."""
    uploads().begin(config_of(output, address, CHECKPOINT__MIRROR_WAIT=float(wait)))
    for tag in tags:
        uploads().submit(output, place_of(tag), policies)
        uploads().finish()


def upload_or_die(output: Path, address: str, tag: Path, rank: int, dies: tuple[int, int]) -> int:
    """One of two ranks in a process of its own: uploads, and is killed at a step of it.

    Args:
        rank: this one.
        dies: the rank that is killed, and at which of its steps; 0 for none.

    Returns:
        The process.
    """
    if pid := os.fork():
        return pid
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if (rank, steps) == dies:
            os.kill(os.getpid(), signal.SIGKILL)

    class Pieces:
        def __init__(self, source: Any) -> None:
            self._source = source

        def read(self, size: int) -> bytes:
            step()
            return self._source.read(size)

    put, stores.PIECE = Store.put, 1 << 15
    Store.put = lambda self, name, source, size: put(self, name, Pieces(source), size)
    own = _Uploads()
    try:
        own.begin(config_of(output, address))
        own._rank, own._ranks = rank, 2
        own.submit(output, place_of(tag), None)
        deadline = time.monotonic() + 20
        while own._jobs and time.monotonic() < deadline:
            time.sleep(0.01)
        (output / f'steps_{rank}').write_text(json.dumps(steps))
    finally:
        os._exit(0)


def end(*pids: int) -> None:
    """Ends processes that may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
