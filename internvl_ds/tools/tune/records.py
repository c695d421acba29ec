"""The trials of a directory: trials.jsonl, one flushed line each, and trials.csv made from it."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from internvl_ds.errors import ConfigError, brief
from internvl_ds.files import open_own, write_text
from internvl_ds.files.reading import LOG_BYTES, parse_json, read_text

# How a trial ended. NO_ROOM and REFUSED were never started, and do not count as trials.
OK, MEMORY, CRASH, HANG = 'ok', 'out of memory', 'crash', 'hang'
NO_ROOM, REFUSED = 'no room', 'refused'

# The purpose of a trial.
BASE, SHIPPED, SEARCH, FINAL = 'base', 'shipped', 'search', 'final'

_COLUMNS = (
    'trial', 'kind', 'name', 'status', 'images_per_s', 'images_per_s_min', 'images_per_s_max',
    'seconds_per_update', 'peak_bytes', 'baseline_bytes', 'micro_batch', 'accumulation', 'round',
    'seconds', 'error', 'opts', 'ds_config',
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One trial."""

    trial: int  # its number, from 0 on: trials/NNN holds its log
    kind: str  # its purpose: BASE, SHIPPED, SEARCH or FINAL
    name: str  # for people
    key: str  # the same for configurations that are the same when resolved
    labels: dict[str, str]  # of a proposal of the search; else empty
    ds_config: dict[str, Any]  # as given to the training program
    opts: dict[str, Any]  # likewise
    status: str  # how it ended: one of this module's constants
    seconds: float = 0.0  # of the whole trial, its start included
    error: str = ''  # why it failed; '' for OK
    # what bench.json held; empty where there was none
    bench: dict[str, Any] = field(default_factory=dict)
    round: int = -1  # of the finals; -1 before them
    after: int = -1  # how many trials came before the finals that this is one of; -1 before them

    @property
    def speed(self) -> float:
        """Images per second over all ranks; 0 for a trial that failed."""
        return float(self.bench['images_per_s']) if self.status == OK else 0.0

    @property
    def started(self) -> bool:
        """Whether anything ran."""
        return self.status not in (NO_ROOM, REFUSED)


def _row(tree: dict[str, Any]) -> Row:
    row, like = Row(**tree), Row(0, '', '', '', {}, {}, {}, '')
    for name, value in asdict(like).items():
        actual = getattr(row, name)
        kinds = (int, float) if isinstance(value, float) else type(value)
        if not isinstance(actual, kinds):
            raise TypeError(f'{name} is {brief(actual)}')
    float(row.speed)
    return row


class Records:
    """The rows of a directory's trials.jsonl, from which everything else is made."""

    def __init__(self, folder: Path) -> None:
        """Reads the file; drops a half-written last line.

        Raises:
            ConfigError: for a line before it that is no row.
        """
        self._path = folder / 'trials.jsonl'
        self.rows: list[Row] = []
        if not os.path.lexists(self._path):
            return
        try:
            text = read_text(self._path, LOG_BYTES, ours=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f'{self._path}: cannot be read: {error}') from error
        whole, newline, half = text.rpartition('\n')
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.rows.append(_row(parse_json(line)))
            except (ValueError, TypeError, LookupError) as error:
                raise ConfigError(
                    f'{self._path}, line {number}: is no trial ({error}); name another --output'
                ) from error
        if half:
            write_text(self._path, whole + newline)

    def append(self, row: Row) -> None:
        """Adds a row, on disk when this returns."""
        with os.fdopen(open_own(self._path, os.O_APPEND), 'a', encoding='utf-8') as file:
            file.write(json.dumps(asdict(row)) + '\n')
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        write_text(self._path.with_suffix('.csv'), csv_text(self.rows))

    def of(self, *kinds: str) -> Iterator[Row]:
        """The rows of these kinds, in order."""
        return (row for row in self.rows if row.kind in kinds)

    def measured(self) -> dict[str, Row]:
        """Key -> the row of a configuration that is settled; the finals do not count."""
        return {row.key: row for row in self.of(BASE, SHIPPED, SEARCH)}

    def spent(self) -> float:
        """Seconds that all trials took."""
        return sum(row.seconds for row in self.rows)


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV, one a trial; memory in bytes, of the rank that needed most."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _COLUMNS, lineterminator='\n')
    writer.writeheader()
    for row in rows:
        low, high = row.bench.get('images_per_s_range', ('', ''))
        values = {**row.bench, **asdict(row), 'images_per_s_min': low, 'images_per_s_max': high}
        values['round'] = '' if row.round < 0 else row.round
        values['seconds'] = round(row.seconds, 1)
        for name in ('opts', 'ds_config'):
            values[name] = json.dumps(values[name])
        writer.writerow({name: values.get(name, '') for name in _COLUMNS})
    return stream.getvalue()
