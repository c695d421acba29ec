"""Whether the contents of a tag's files are what was written, there. Files only; knows no ranks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from internvl_ds.checkpoint.formats.ema_files import identity_in, open_safetensors
from internvl_ds.checkpoint.formats.outline import outline
from internvl_ds.checkpoint.formats.state_json import read_state
from internvl_ds.checkpoint.tag.discovery import read_manifest
from internvl_ds.checkpoint.tag.hashing import hash_file
from internvl_ds.checkpoint.tag.identity import require_identity
from internvl_ds.checkpoint.tag.manifest import LOOP_FILE, STATE_FILE, Identity, Manifest, file_rank
from internvl_ds.errors import CheckpointError
from internvl_ds.files.reading import interpreting


def share_of(names: Iterable[str], rank: int, world_size: int) -> list[str]:
    """The files that ``rank`` verifies when all ranks share the work: its own shards, if it can."""
    return [name for name in names if file_rank(name) % world_size == rank]


def weight_files(manifest: Manifest) -> list[str]:
    """The files of a tag that hold its weights, and state.json."""
    ending = '_states.pt' if manifest.header.zero_stage == 3 else '_model_states.pt'
    return [STATE_FILE, *(name for name in manifest.files if name.endswith(ending))]


def training_files(manifest: Manifest, rank: int | None = None) -> list[str]:
    """The files that training goes on from: those that a rank reads itself; None for any rank's."""
    loops = {LOOP_FILE.format(file_rank(name)) for name in manifest.files}
    names = [n for n in manifest.files if n.endswith('_states.pt') or n in loops]
    if rank is not None:
        shared = [name for name in names if 'pp_rank' not in name and name not in loops]
        names = [name for name in names if name in shared or file_rank(name) == rank]
    return [STATE_FILE, *names]


def ema_files_of_rank(manifest: Manifest, rank: int) -> list[str]:
    """What a sharded average reads on one rank, and state.json."""
    files = [name for name in manifest.files if name.startswith('ema_rank_')]
    return [STATE_FILE, *(name for name in files if file_rank(name) in (0, rank))]


def damage(tag: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Reads the named files whole, and says of each that differs from the manifest how it does.

    A name that the manifest does not list is damage too.
    """
    damages = []
    for name in names:
        entry = manifest.files.get(name)
        if entry is None:
            damages.append(f'{tag / name}: not a file of this checkpoint')
            continue
        try:
            actual = hash_file(tag / name, entry.size)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            damages.append(f'{tag / name}: cannot be read: {reason}')
            continue
        if actual.size != entry.size:
            damages.append(f'{tag / name}: has {actual.size} bytes, not {entry.size}')
        elif actual.digest != entry.digest:
            digests = f'its xxh3-128 is {actual.digest}, and {entry.digest} was written'
            damages.append(f'{tag / name}: damaged: {digests}')
        else:
            damages += _foreign(tag / name, manifest)
    return damages


def _foreign(path: Path, manifest: Manifest) -> list[str]:
    """Whether a file with the right checksum is of another save or rank."""
    if not manifest.header.save:  # of an earlier version
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
    return None if manifest is None else damage(tag, manifest, manifest.files)
