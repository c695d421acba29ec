"""Fetches a tag from a mirror into OUTPUT, where OUTPUT has none as new. All ranks agree."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import IO, Any, TypeVar

from internvl_ds.checkpoint.load_context import Load
from internvl_ds.checkpoint.mirror.places import Place, read_whole, whole_places
from internvl_ds.checkpoint.mirror.store import PIECE, Store
from internvl_ds.checkpoint.mirror.uploads import one_line, uploads
from internvl_ds.checkpoint.tag import commit
from internvl_ds.checkpoint.tag.discovery import header_or_none, read_manifest
from internvl_ds.checkpoint.tag.hashing import write_hashed
from internvl_ds.checkpoint.tag.manifest import FILE_NAME, FileEntry, Manifest, epoch_of
from internvl_ds.checkpoint.tag.output_lock import enter_output, note_save
from internvl_ds.checkpoint.tag.verify import share_of
from internvl_ds.config.mirror import mirror_of
from internvl_ds.config.tree import checkpoint_option
from internvl_ds.dist.rendezvous import exchange, rank, world_size
from internvl_ds.errors import CheckpointError
from internvl_ds.files import write_text
from internvl_ds.files.addresses import redacted

_T = TypeVar('_T')

# Seconds in which something must come from a mirror, or it counts as not there.
_STALL = 120.0
# How often a file is asked for, and the seconds between.
_ATTEMPTS, _PAUSE = 3, 2.0


def fetch_newer(load: Load, output: Path, local: Path | None) -> Path | None:
    """Fetches the newest whole tag of CHECKPOINT.MIRROR. Collective: every rank calls it.

    Each rank fetches a share of the files, compares them with the manifest, and rank 0 commits the
    tag as a save does. One that is damaged is passed over with a warning, and the next is tried.

    Args:
        load: its configuration names the mirror.
        output: where the tag goes.
        local: the newest whole tag there, or a file; None for none.

    Returns:
        The tag's path in ``output``; None where the mirror has none that is newer than ``local``.

    Raises:
        CheckpointError: when the mirror cannot be listed: it may have a newer tag.
    """
    address = mirror_of(load.config)

    def candidates() -> list[Place]:
        header = header_or_none(local) if local else None
        least = (False, -1)
        if local and (header or local.exists()):
            least = (epoch_of(local.name) is not None, header.sequence if header else 0)
        try:
            places = whole_places(_within(lambda _: Store(address).names()))
        except Exception as error:
            raise CheckpointError(
                f'CHECKPOINT.MIRROR {redacted(address)}: cannot be listed ({one_line(error)}), and '
                "may have a newer tag than OUTPUT: start again when it answers, or set it to ''"
            ) from error
        uploads().saw(max((place.sequence for place in places), default=-1))
        newer = (place for place in places if place.order > least)
        return sorted(newer, key=lambda place: place.order, reverse=True)

    for values in load.from_rank_0('look into the mirror', candidates):
        place = Place(*values)
        faults = _fetch(load, address, output, place)
        if not faults:
            return output / place.tag
        where = f'{redacted(address)}/{place.name}'
        load.logger.warning('%s: passed over: %s', where, '; '.join(faults[:3]))
    return None


def _fetch(load: Load, address: str, output: Path, place: Place) -> list[str]:
    """Fetches one tag; returns what is wrong with it. Collective: every rank calls it."""
    start, begun = time.monotonic(), _Begun()
    try:
        name, fault = load.from_rank_0(
            'begin to fetch', lambda: begun.begin(load, address, output, place)
        )
        if fault:
            return [fault]
        report = _fetch_share(address, output / name, place)
        reports = exchange('fetch from the mirror', report, load.io_timeout)
        if faults := [fault for fault in reports if fault]:
            return faults
        load.from_rank_0('commit what was fetched', lambda: begun.commit(place))
    finally:
        if begun.staging is not None:
            commit.abandon(begun.staging)
    load.logger.info(
        '%s: fetched from %s in %.1f s', output / place.tag, redacted(address),
        time.monotonic() - start,
    )  # fmt: skip
    return []


class _Begun:
    """What rank 0 knows of a tag that is being fetched."""

    staging: commit.Staging | None = None
    manifest: Manifest

    def begin(self, load: Load, address: str, output: Path, place: Place) -> tuple[str, str]:
        """The name of the staging directory, with the manifest in it; or what is wrong."""
        try:
            self.manifest = _within(lambda _: read_whole(Store(address), place))
        except Exception as error:
            return '', one_line(error)
        try:
            enter_output(output, load.config, load.timeout)
            size = sum(entry.size for entry in self.manifest.files.values())
            if size > (free := shutil.disk_usage(output).free):
                raise CheckpointError(
                    f'{output / place.tag}: fetching it from CHECKPOINT.MIRROR takes {size} bytes, '
                    f'and {free} are free'
                )
            age = checkpoint_option(load.config, 'LEFTOVER_AGE')
            self.staging = commit.begin(output, place.tag, age=age)
            write_text(self.staging.path / FILE_NAME, self.manifest.to_text())
        except OSError as error:
            raise CheckpointError(f'{output / place.tag}: cannot be fetched: {error}') from error
        return self.staging.path.name, ''

    def commit(self, place: Place) -> None:
        """Publishes the tag."""
        assert self.staging is not None
        output = self.staging.output
        try:
            commit.commit(self.staging, self.manifest, latest=epoch_of(place.tag) is not None)
        except OSError as error:
            raise CheckpointError(f'{output / place.tag}: cannot be committed: {error}') from error
        self.staging = None
        note_save(output, place.tag, place.save)


def _fetch_share(address: str, staging: Path, place: Place) -> str | None:
    """Fetches this rank's files; returns what is wrong."""
    try:
        manifest = read_manifest(staging) if staging.is_dir() else None
        if manifest is None:
            return f'{staging}: not there for rank {rank()}: OUTPUT must be one shared directory'
        store = _within(lambda _: Store(address))
        for name in share_of(manifest.files, rank(), world_size()):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            _fetch_file(store, f'{place.name}/{name}', staging / name, manifest.files[name])
    except Exception as error:  # of files, of the client
        return f'rank {rank()}: {one_line(error)}'
    return None


def _fetch_file(store: Store, name: str, path: Path, entry: FileEntry) -> None:
    def copy(file: IO[bytes], moved: list[int]) -> None:
        with store.open(name) as (source, size):
            if size != entry.size:
                raise CheckpointError(f'{name}: has {size} bytes, not {entry.size}')
            while moved[0] < size and (piece := source.read(min(PIECE, size - moved[0]))):
                file.write(piece)
                moved[0] += len(piece)

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            actual = write_hashed(path, lambda file: _within(lambda moved: copy(file, moved)))
            break
        except (CheckpointError, FileNotFoundError):
            raise
        except Exception:
            if attempt == _ATTEMPTS:
                raise
            time.sleep(_PAUSE * attempt)
    if actual != entry:
        raise CheckpointError(f'{name}: damaged: another xxh3-128 than was written')


def _within(action: Callable[[list[int]], _T]) -> _T:
    """Runs ``action`` on a thread; gives up when the number that it is given stands still."""
    future: Future[_T] = Future()
    moved = [0]

    def run() -> None:
        try:
            future.set_result(action(moved))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name='mirror', daemon=True).start()
    before: Any = None
    while not wait([future], _STALL).done and moved[0] != before:
        before = moved[0]
    if not future.done():
        raise TimeoutError(f'nothing came in {_STALL:g} s')
    return future.result()
