"""The files that a run writes: logs, config.json, and metrics.jsonl."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from yacs.config import CfgNode

from internvl_ds.errors import printable
from internvl_ds.files import open_own, write_text
from internvl_ds.files.addresses import redacted
from internvl_ds.files.reading import LOG_BYTES, parse_json, read_text

_FORMAT = '[%(asctime)s rank {rank}] %(levelname)s %(message)s'

# Marks of records (``extra=``) that the console leaves out: those that a progress bar on it makes
# superfluous, and those that reach it by another way.
PROGRESS = {'progress': True}
FILE_ONLY = {'file_only': True}


def open_log(output: str | Path, rank: int, console: bool | None = None) -> logging.Logger:
    """Opens the package's logger: ``log_rank{rank}.txt`` in ``output``, appended to, and a console.

    A second call replaces what the first one opened. A file that cannot be written is a warning.

    Args:
        output: a directory; made if it is not there.
        rank: this process's global rank.
        console: whether this rank writes to stdout as well; by default rank 0 alone does.
    """
    path = Path(output) / f'log_rank{rank}.txt'
    logger = logging.getLogger('internvl_ds')
    close_log(logger)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handlers: list[logging.Handler] = []
    failure = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(path, encoding='utf-8'))
    except OSError as error:
        failure = error
    if rank == 0 if console is None else console:
        handlers.append(_ConsoleHandler())
    for handler in handlers:
        handler.setFormatter(_Formatter(_FORMAT.format(rank=rank)))
        logger.addHandler(handler)
    if failure is not None:  # on a rank without a console logging itself writes it to stderr
        logger.warning('%s: cannot be written (%s): the run goes on without it', path, failure)
    return logger


def close_log(logger: logging.Logger) -> None:
    """Flushes and closes the logger's files; safe to call twice."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


def shows_bar(rank: int) -> bool:
    """Whether this rank shows a progress bar: rank 0, when its stdout is a terminal."""
    return rank == 0 and sys.stdout.isatty()


def write_config(config: CfgNode, output: str | Path) -> Path:
    """Writes the resolved config to ``output/config.json``. Rank 0 alone calls it."""
    path = Path(output) / 'config.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, redacted(json.dumps(_plain(config), indent=2)) + '\n')
    return path


class MetricsLog:
    """``metrics.jsonl``: one JSON object per epoch, in order. Rank 0 alone has one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> list[dict[str, Any]]:
        """The records, without a line that a killed run left half written.

        Raises:
            OSError, ValueError: when the file cannot be read; `drop_from` leaves it as it is then.
        """
        if self.path.is_symlink() or not self.path.exists():  # what is written replaces a link
            return []
        text = read_text(self.path, LOG_BYTES, ours=True)
        records = []
        for line in text.splitlines():
            try:
                record = parse_json(line) if line.startswith('{') else None
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get('epoch'), int):
                records.append(record)
        return records

    def drop_from(self, epoch: int, last: Mapping[str, Any] | None = None) -> None:
        """Removes the records of ``epoch`` and later ones, which are about to be repeated.

        Args:
            epoch: that a run goes on with.
            last: the record of the epoch before, from the tag that it resumes from: added where the
                run that saved it was killed before it wrote the line.
        """
        records = [record for record in self.read() if record['epoch'] < epoch]
        known = {record['epoch'] for record in records}
        if last and last['epoch'] == epoch - 1 and epoch - 1 not in known and self.path.is_file():
            records.append(dict(last))  # without a file it would be another run's
        write_text(self.path, ''.join(_line(record) for record in records))

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one epoch's record; values that JSON has no word for (nan, inf) become null."""
        with os.fdopen(open_own(self.path, os.O_APPEND), 'a', encoding='utf-8') as file:
            file.write(_line(record))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _LogFile(logging.FileHandler):
    """A log file whose first write error is one line on stderr; later ones are silent."""

    _told = False

    def _open(self) -> io.TextIOWrapper:
        descriptor = open_own(Path(self.baseFilename), os.O_APPEND)
        return os.fdopen(descriptor, 'a', encoding=self.encoding)

    def handleError(self, record: logging.LogRecord | None) -> None:
        if not self._told:
            self._told = True
            reason = sys.exc_info()[1]
            print(f'{self.baseFilename}: cannot be written ({reason})', file=sys.stderr)

    def close(self) -> None:
        try:
            super().close()  # writes what is left
        except OSError:
            self.handleError(None)


class _ConsoleHandler(logging.StreamHandler):
    """Writes to stdout; beside a progress bar on a terminal it leaves the bar in one piece."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self._terminal = sys.stdout.isatty()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, 'file_only', False):
            return
        if not self._terminal:
            super().emit(record)
        elif not getattr(record, 'progress', False):
            try:
                tqdm.write(self.format(record))
            except OSError:  # the terminal is gone
                self.handleError(record)


def _line(record: Mapping[str, Any]) -> str:
    odd = {k: None for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps({**record, **odd}, allow_nan=False) + '\n'


def _plain(value: Any) -> Any:
    """Nested mappings and sequences as JSON types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
