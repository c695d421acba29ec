"""The second half of a save: each rank writes its files and proves them, and rank 0 commits."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from internvl_ds.checkpoint.checkpoint_engine import ShardWriter
from internvl_ds.checkpoint.formats.state_json import state_text
from internvl_ds.checkpoint.mirror.places import Place
from internvl_ds.checkpoint.mirror.uploads import uploads
from internvl_ds.checkpoint.proof import Wanted, prove
from internvl_ds.checkpoint.tag import commit
from internvl_ds.checkpoint.tag.discovery import sizes_of
from internvl_ds.checkpoint.tag.hashing import flush_and_hash, write_hashed
from internvl_ds.checkpoint.tag.manifest import (
    FORMAT_APART,
    FORMAT_LINKED,
    LOOP_FILE,
    STATE_FILE,
    FileEntry,
    Header,
    Manifest,
)
from internvl_ds.checkpoint.tag.output_lock import note_save
from internvl_ds.checkpoint.tag.retention import Policy
from internvl_ds.checkpoint.tag.trash import MARK
from internvl_ds.dist.rendezvous import from_rank_0, gather, rank
from internvl_ds.errors import CheckpointError
from internvl_ds.files.addresses import redacted


@dataclass
class Save:
    """A save under way, as one rank knows it; nothing in it changes with further training.

    Attributes:
        output, tag: where it goes.
        writer: holds this rank's files.
        staging_path: where they are written.
        header: the manifest's, but for what is known at the commit only.
        policies: retention; None for a tag that is neither counted nor named by ``latest``.
        in_background: training goes on as soon as the files are copied.
        io_timeout: seconds that one rank may be slower than another.
        wanted: what the files must hold.
        loop: what goes into this rank's loop_rank_*.json.
        staging, state: on rank 0 only: the lock, and what goes into state.json.
    """

    output: Path
    tag: str
    writer: ShardWriter
    staging_path: Path
    header: dict[str, Any]
    policies: list[Policy] | None
    in_background: bool
    io_timeout: float
    logger: logging.Logger
    wanted: Wanted
    loop: dict[str, Any] = field(default_factory=dict)
    staging: commit.Staging | None = None
    state: dict[str, Any] = field(default_factory=dict)


def finish(save: Save) -> None:
    """Writes the files, reports, commits; on any thread. Collective: every rank calls it."""

    def commit_or_abandon() -> int:
        try:
            return _commit(save, reports)
        except Exception:
            abandon(save)  # before the others hear of it
            raise

    try:
        report = _write_own_files(save)
        reports = gather('write checkpoint', report, save.io_timeout)
        sequence = from_rank_0('commit', commit_or_abandon, save.io_timeout)
    except Exception as error:
        abandon(save)
        if save.writer.error is not None:
            raise error from save.writer.error
        raise
    save.writer.unchanged.committed(save.output / save.tag)
    save.writer.last_size = sum(entry.size for entry in save.writer.entries.values())
    save.logger.info('%s saved !!!', save.output / save.tag)
    place = Place(sequence, save.tag, save.header['save'])
    uploads().submit(save.output, place, save.policies)


def abandon(save: Save) -> None:
    """Ends a failed save and removes its staging directory."""
    save.writer.forget()
    if save.staging is not None:
        commit.abandon(save.staging)


def _write_own_files(save: Save) -> dict[str, Any]:
    writer = save.writer
    writer.finish()
    try:
        if writer.error is None:
            _write_text(save, LOOP_FILE.format(rank()), state_text(save.loop))
        if rank() == 0 and writer.error is None:
            # Here, because the YAML of a configuration takes longer than much of a copy.
            text = state_text({**save.state, 'config': redacted(save.state['config'].dump())})
            _write_text(save, STATE_FILE, text)
        if writer.error is None:
            prove(save.staging_path, _entries(save), save.wanted)
    except (OSError, CheckpointError) as error:
        writer.error = error
    except Exception as error:  # the others wait for the report
        writer.error = CheckpointError(f'{save.staging_path}: cannot be read again: {error!r}')
    if writer.error is not None:
        return {'error': str(writer.error)}
    files = {name: list(entry) for name, entry in _entries(save).items()}
    return {'files': files, 'linked': writer.unchanged.linked}


def _entries(save: Save) -> dict[str, FileEntry]:
    """The files of this rank, by their names in the tag."""
    entries, apart = save.writer.entries, save.writer.apart
    named = {str(path.relative_to(save.staging_path)): entry for path, entry in entries.items()}
    return named if apart is None else {**named, **apart.files}


def _write_text(save: Save, name: str, text: str) -> None:
    path = save.staging_path / name
    save.writer.entries[path] = write_hashed(path, lambda file: file.write(text.encode()))


def _commit(save: Save, reports: list[dict[str, Any]] | None) -> int:
    """Publishes the tag; returns the number of the save."""
    assert save.staging is not None  # this is rank 0
    assert reports is not None
    errors = {r: report['error'] for r, report in enumerate(reports) if 'error' in report}
    outcome = f'{save.output / save.tag}: not saved, and the earlier checkpoints stay: '
    if errors:
        raise CheckpointError(outcome + '; '.join(f'rank {r}: {e}' for r, e in errors.items()))
    files = {n: FileEntry(*e) for report in reports for n, e in report['files'].items()}
    try:
        sizes = sizes_of(save.staging_path, files)
        commit.require_files(save.staging, files, sizes)
        for name in sizes.keys() - files.keys() - {MARK}:  # what DeepSpeed wrote by itself
            files[name] = flush_and_hash(save.staging_path / name)
        if save.writer.apart is not None and save.writer.apart.header:
            save.header |= {'frozen': save.writer.apart.header, 'format': FORMAT_APART}
        if linked := {save: tag for report in reports for save, tag in report['linked'].items()}:
            save.header |= {'linked': linked, 'format': FORMAT_LINKED}
        header = Header(
            tag=save.tag,
            sequence=max(commit.next_sequence(save.output), uploads().next_sequence()),
            saved_at=datetime.now(timezone.utc).isoformat(timespec='seconds'),
            size=sum(entry.size for entry in files.values()),
            **save.header,
        )
        manifest = Manifest(header, dict(sorted(files.items())))
        commit.commit(save.staging, manifest, latest=save.policies is not None)
    except OSError as error:
        raise CheckpointError(f'{outcome}rank 0 cannot commit it: {error}') from error
    note_save(save.output, save.tag, header.save)
    if save.policies is not None:
        try:
            commit.prune(save.output, [*save.policies, uploads().held()])
        except OSError as error:
            save.logger.warning('%s: old tags stay for now: %s', save.output, error)
    return header.sequence
