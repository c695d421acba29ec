"""Compares the contents of a tag's files with their checksums. Files only; knows no ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from internvl_ds.checkpoint.formats.ema_files import identity_in, open_safetensors
from internvl_ds.checkpoint.formats.outline import outline
from internvl_ds.checkpoint.formats.state_json import read_state
from internvl_ds.checkpoint.frozen.frozen_file import joined
from internvl_ds.checkpoint.tag.discovery import read_manifest
from internvl_ds.checkpoint.tag.hashing import hash_file
from internvl_ds.checkpoint.tag.identity import require_identity
from internvl_ds.checkpoint.tag.manifest import (
    LOOP_FILE,
    STATE_FILE,
    FileEntry,
    Identity,
    Manifest,
    file_rank,
    is_shared,
    wrong_files,
)
from internvl_ds.checkpoint.tag.places import place_of
from internvl_ds.checkpoint.tag.shared import Known
from internvl_ds.errors import CheckpointError
from internvl_ds.files.reading import interpreting


def share_of(names: Iterable[str], rank: int, world_size: int) -> list[str]:
    """The files that ``rank`` verifies if all ranks share the work: shards go to their own rank."""
    return [name for name in names if file_rank(name) % world_size == rank]


def weight_files(manifest: Manifest) -> list[str]:
    """The files of a tag that hold its weights, and state.json."""
    ending = '_states.pt' if manifest.header.zero_stage == 3 else '_model_states.pt'
    weights = (name for name in manifest.files if name.endswith(ending) or is_shared(name))
    return [STATE_FILE, *weights]


class Seen:
    """Files that were compared with their checksums when their tag was chosen.

    The load that follows need not read them for that again. Each counts once, and only as long as
    it is the same file, of the same size and time.
    """

    def __init__(self) -> None:
        self._files: dict[Path, tuple[int, ...]] = {}

    def look(self, tag: Path, names: Iterable[str]) -> None:
        """Notes files that are about to be compared, in the place of all others."""
        self._files = {path: key for n in names if (key := _key_of(path := place_of(tag, n)))}

    def forget(self) -> None:
        """What was noted is not right, or of no load."""
        self._files = {}

    def take(self, tag: Path, name: str) -> bool:
        """Whether a file is as it was when it was compared; the next call says no."""
        path = place_of(tag, name)
        key = self._files.pop(path, None)
        return key is not None and key == _key_of(path)


def _key_of(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def training_files(
    manifest: Manifest, rank: int | None = None, host: Sequence[int] = ()
) -> list[str]:
    """The files that a resume reads: those of one rank, or (None) of every rank.

    Args:
        manifest: of the tag.
        rank: whose files.
        host: the ranks of its host, which compare what all of them read each for all; with none
            the rank is alone.
    """
    loops = {LOOP_FILE.format(file_rank(name)) for name in manifest.files}
    names = [n for n in manifest.files if n.endswith('_states.pt') or n in loops or is_shared(n)]
    names = [STATE_FILE, *names]
    if rank is None:
        return names
    sliced = manifest.header.zero_stage == 3  # each rank has its own frozen parameters
    own = {n for n in names if 'pp_rank' in n or n in loops or (is_shared(n) and sliced)}
    host = host or [rank]
    return [
        n for n in names if (file_rank(n) if n in own else host[file_rank(n) % len(host)]) == rank
    ]


def ema_files_of_rank(manifest: Manifest, rank: int, host: Sequence[int] = ()) -> list[str]:
    """The files that a sharded average reads on one rank, and state.json; see `training_files`."""
    files = [name for name in manifest.files if name.startswith('ema_rank_')]
    host = host or [rank]
    common = [STATE_FILE, *(name for name in files if file_rank(name) == 0)]
    own = [name for name in files if file_rank(name) == rank != 0]
    return [*(common if host[0] == rank else ()), *own]


def damage(
    tag: Path, manifest: Manifest, names: Iterable[str], known: Known | None = None
) -> list[str]:
    """Reads the named files whole; describes each difference from the manifest.

    A name that the manifest does not list is damage too. Several tags may have one file by links:
    with the same ``known`` for all it is read once.
    """
    damages = []
    for name in names:
        entry = manifest.files.get(name)
        if entry is None:
            damages.append(f'{tag / name}: not a file of this checkpoint')
            continue
        path = place_of(tag, name)
        try:
            actual = _hash(path, entry.size, {} if known is None else known)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            text = f'{path}: cannot be read: {reason}'
            if is_shared(name) and isinstance(error, FileNotFoundError):
                lay_in = manifest.header.frozen.get('output', '')
                text = f'{tag}: {wrong_files({name: entry}, {}, lay_in)[0]}'
            damages.append(text)
            continue
        if actual.size != entry.size:
            damages.append(f'{path}: has {actual.size} bytes, not {entry.size}')
        elif actual.digest != entry.digest:
            digests = f'its xxh3-128 is {actual.digest}, and {entry.digest} was written'
            damages.append(f'{path}: damaged: {digests}')
        else:
            damages += _foreign(path, manifest)
    return damages


def _hash(path: Path, size: int, known: Known) -> FileEntry:
    status = path.stat()
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if status.st_size != size or key not in known:  # of another size only that is told
        known[key] = hash_file(path, size)
    return known[key]


def _foreign(path: Path, manifest: Manifest) -> list[str]:
    """Whether a file with the right checksum is of another save or rank."""
    # Of an earlier version; or of no save: what a shared file is named says all of it.
    if not manifest.header.save or is_shared(path.name):
        return []
    try:
        if path.suffix == '.json':
            entry = read_state(path).get(Identity.KEY)
        elif path.suffix == '.safetensors':
            with open_safetensors(path) as file:
                entry = identity_in(file.metadata())
        elif path.name.endswith('_states.pt'):
            with interpreting(path, CheckpointError):
                entry = outline(path).get(Identity.KEY)
        else:  # DeepSpeed's scripts
            return []
        require_identity(path, entry, manifest.header)
    except CheckpointError as error:
        return [str(error)]
    return []


def damage_of_tag(tag: Path) -> list[str] | None:
    """What is wrong with any file of a tag; None for one without a manifest (plain DeepSpeed's)."""
    manifest = read_manifest(tag)
    if manifest is None:
        return None
    return damage(tag, manifest, manifest.files) or damage_of_sources(tag, manifest)


def damage_of_sources(tag: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the files that a tag takes omitted parameters from."""
    found: dict[str, None] = {}  # once for all ranks
    names = manifest.files if manifest.header.frozen.get('kept') == 'omit' else ()
    for path in (tag / name for name in names if name.endswith('_model_states.pt')):
        try:
            joined(tag, path, outline(path))
        except CheckpointError as error:
            found[str(error)] = None
    return list(found)
