"""What a run writes down: log files, config.json, and metrics.jsonl."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from yacs.config import CfgNode

from internvl_ds.files import write_text

_FORMAT = '[%(asctime)s rank {rank}] %(levelname)s %(message)s'

# Marks of records (``extra=``) that the console leaves out: those that a progress bar on it makes
# superfluous, and those that reach it by another way.
PROGRESS = {'progress': True}
FILE_ONLY = {'file_only': True}


def open_log(output: str | Path, rank: int, console: bool | None = None) -> logging.Logger:
    """Opens the package's logger: ``log_rank{rank}.txt`` in ``output``, appended to, and a console.

    Messages of every module of this package go the same way. Each rank calls it for itself;
    calling it again replaces what the first call opened.

    Args:
        output: a directory; made if it is not there.
        rank: this process's global rank.
        console: whether this rank writes to stdout as well; by default rank 0 alone does.
    """
    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger('internvl_ds')
    close_log(logger)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handlers: list[logging.Handler] = [
        logging.FileHandler(directory / f'log_rank{rank}.txt', encoding='utf-8')
    ]
    if rank == 0 if console is None else console:
        handlers.append(_ConsoleHandler())
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT.format(rank=rank)))
        logger.addHandler(handler)
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
    write_text(path, json.dumps(_plain(config), indent=2) + '\n')
    return path


class MetricsLog:
    """``metrics.jsonl``: one JSON object per epoch, in order. Rank 0 alone has one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> list[dict[str, Any]]:
        """The records, without a line that a killed run left half written."""
        if not self.path.is_file():
            return []
        records = []
        for line in self.path.read_text(encoding='utf-8').splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get('epoch'), int):
                records.append(record)
        return records

    def drop_from(self, epoch: int) -> None:
        """Removes the records of ``epoch`` and later ones, which are about to be repeated."""
        kept = [record for record in self.read() if record['epoch'] < epoch]
        if kept or self.path.is_file():
            write_text(self.path, ''.join(_line(record) for record in kept))

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one epoch's record; values that JSON has no word for (nan, inf) become null."""
        with self.path.open('a', encoding='utf-8') as file:
            file.write(_line(record))


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
            tqdm.write(self.format(record))


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + '\n'


def _plain(value: Any) -> Any:
    """Nested mappings and sequences as what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
