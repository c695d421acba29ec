"""Compares the contents of a tag's files with their checksums. Files only; knows no ranks."""

from __future__ import annotations

from collections.abc import Iterable
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


def training_files(manifest: Manifest, rank: int | None = None) -> list[str]:
    """The files that a resume reads: those of one rank, or (None) of every rank."""
    loops = {LOOP_FILE.format(file_rank(name)) for name in manifest.files}
    names = [n for n in manifest.files if n.endswith('_states.pt') or n in loops or is_shared(n)]
    if rank is not None:
        sliced = manifest.header.zero_stage == 3  # each rank has its own frozen parameters
        own = {n for n in names if 'pp_rank' in n or n in loops or (is_shared(n) and sliced)}
        shared = [name for name in names if name not in own]
        names = [name for name in names if name in shared or file_rank(name) == rank]
    return [STATE_FILE, *names]


def ema_files_of_rank(manifest: Manifest, rank: int) -> list[str]:
    """The files that a sharded average reads on one rank, and state.json."""
    files = [name for name in manifest.files if name.startswith('ema_rank_')]
    return [STATE_FILE, *(name for name in files if file_rank(name) in (0, rank))]


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
