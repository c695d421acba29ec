"""Tables of images: CSV or JSON lines with the columns ``path`` and ``label``."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from internvl_ds.errors import ConfigError, brief, few, shown
from internvl_ds.files.reading import open_data, parse_json
from internvl_ds.train.datasets.sources import Folder, Opened

_COLUMNS = ('path', 'label')
_LINE_BYTES = 1 << 20  # of one row
# Labels of this form that are not whole numbers are mistakes, and no names: sorted as text, 10.0
# comes before 2.0.
_NUMBER = re.compile(r'[+-]?\d+(\.\d*)?')

_DIGITS = 19  # of a label, too many

Row = tuple[int, str, Any]  # line, path, label


class Listed(Folder):
    """Files that the lines of a table name; messages name the line too."""

    def __init__(self, root: Path, names: Sequence[str], table: Path, lines: Sequence[int]) -> None:
        super().__init__(root, names)
        self._table, self._lines = table, np.array(lines, dtype=np.int64)

    def where(self, index: int) -> str:
        """Path of an image, and what names it."""
        return f'{self.path(index)} ({self._table}, line {self._lines[index]})'


def open_table(config: CfgNode, split: str) -> Opened:
    """Opens ``split.csv`` or ``split.jsonl`` (DATA.DATASET) of DATA.META_DATA, or of DATA_PATH.

    Labels are numbers, all of them, or names. The table ``train`` says which, and the classes are
    the names in it, sorted; without it, as in an evaluation elsewhere, the split's own.

    Raises:
        ConfigError: names the table and the line.
    """
    kind, multi = config.DATA.DATASET, config.DATA.MULTI_LABEL
    root = Path(config.DATA.DATA_PATH)
    folder = Path(config.DATA.META_DATA or root)
    table = folder / f'{split}.{kind}'
    if not table.is_file():
        raise ConfigError(
            f'DATA.DATASET {kind!r}: there is no {table} (columns path and label; paths are below '
            'DATA.DATA_PATH)'
        )
    rows = read_table(table, multi=multi)
    first = folder / f'train.{kind}'
    if split == 'train' or not first.is_file():
        first, of_classes = table, rows
    else:
        of_classes = read_table(first, multi=multi)
    text = kind == 'csv'  # which has no numbers but as text
    index = _index_of(first, of_classes, text=text)
    labels = [
        [_number(table, row, each, index, text=text) for each in _labels_of(row)] for row in rows
    ]
    source = Listed(root, [path for _, path, _ in rows], table, [line for line, _, _ in rows])
    for number in {0, len(rows) // 2, len(rows) - 1}:
        if not Path(source.path(number)).exists():
            line, path, _ = rows[number]
            raise ConfigError(f'{table}, line {line}: there is no {shown(root / path)}')
    numbers = [number for row in labels for number in row]
    classes = [] if index is None else list(index)
    count = len(classes) or max(numbers, default=0) + 1
    return Opened(source, labels if multi else numbers, classes, count)


def read_table(path: Path, *, multi: bool) -> list[Row]:
    """The rows of a table: line, path, and a label or, where ``multi``, a list of them.

    Raises:
        ConfigError: names the line that is no row.
    """
    read = _read_csv if path.suffix == '.csv' else _read_jsonl
    rows = []
    line = 1
    try:
        for line, values in read(path):
            name, label = values['path'], values['label']
            if not isinstance(name, str) or not name or '\0' in name:
                raise ConfigError(f'{path}, line {line}: path is {brief(name)}, and no path')
            os.fsencode(name)  # raises ValueError for what no file system has
            if multi and isinstance(label, str) and read is _read_csv:
                label = [each.strip() for each in label.split('|')] if label.strip() else []
            if isinstance(label, list) and not multi:
                raise ConfigError(
                    f'{path}, line {line}: label is a list, {brief(label)}; images of several '
                    'labels are read with DATA.MULTI_LABEL True'
                )
            for each in label if isinstance(label, list) else [label]:
                if type(each) not in (int, str) or each == '':
                    raise ConfigError(
                        f'{path}, line {line}: label is {brief(label)}, and takes the name or the '
                        'number of a class'
                    )
            rows.append((line, name, label if isinstance(label, list) or not multi else [label]))
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f'{path}, line {line} or the next: cannot be read: {error}') from error
    if not rows:
        raise ConfigError(f'{path}: lists no image')
    return rows


def _read_csv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open_data(path) as file:
        text = io.TextIOWrapper(file, 'utf-8-sig', newline='')
        reader = csv.DictReader(text, strict=True)
        if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
            raise ConfigError(
                f'{path}, line 1: has no column {" and no ".join(missing)}; its columns are '
                f'{shown(few(reader.fieldnames or ["none"]))}'
            )
        if twice := [name for name in _COLUMNS if (reader.fieldnames or []).count(name) > 1]:
            raise ConfigError(f'{path}, line 1: has the column {" and ".join(twice)} twice')
        for row in reader:
            if None in row or None in row.values():
                raise ConfigError(
                    f'{path}, line {reader.line_num}: does not have the '
                    f'{len(reader.fieldnames or ())} columns of line 1'
                )
            yield reader.line_num, {name: row[name].strip() for name in _COLUMNS}


def _read_jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open_data(path) as file:
        number = 0
        while line := file.readline(_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode('utf-8-sig' if number == 1 else 'utf-8'))
            except ValueError as error:
                raise ConfigError(f'{path}, line {number}: is no JSON: {error}') from error
            if not isinstance(row, dict) or not row.keys() >= set(_COLUMNS):
                raise ConfigError(
                    f'{path}, line {number}: is {brief(row)}, and no object with path and label'
                )
            yield number, row


def _index_of(table: Path, rows: Sequence[Row], *, text: bool) -> dict[str, int] | None:
    """The label of each class name in a table, sorted by name; None where labels are numbers.

    Raises:
        ConfigError: where a CSV has numbers alone, and one is none of a class.
    """
    names = {each for row in rows for each in _labels_of(row) if isinstance(each, str)}
    if not names or (text and all(name.isdecimal() for name in names)):
        return None
    if text and all(map(_NUMBER.fullmatch, names)):
        line, label = next(
            (line, each) for line, _, label in rows for each in np.atleast_1d(label).tolist()
            if not each.isdecimal()
        )  # fmt: skip
        raise ConfigError(
            f'{table}, line {line}: label is {brief(label)}, and not a number of 0 and above'
        )
    return {name: label for label, name in enumerate(sorted(names))}


def _number(
    table: Path, row: Row, label: Any, index: Mapping[str, int] | None, *, text: bool
) -> int:
    if index is None and text and label.isdecimal() and len(label) < _DIGITS:
        return int(label)
    if index is None and isinstance(label, int) and label >= 0:
        return label
    if index is not None and label in index:
        return index[label]
    known = (
        'a number of 0 and above'
        if index is None
        else f'one of the {len(index)} class names of the training images ({few(list(index))})'
    )
    raise ConfigError(f'{table}, line {row[0]}: label is {brief(label)}, and not {known}')


def _labels_of(row: Row) -> list[Any]:
    return row[2] if isinstance(row[2], list) else [row[2]]
