"""The data sets of the original's table: where they lie, and how the table is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_ds.errors import ConfigError
from internvl_ds.tools.text import table

# DATA.DATASET -> title of the column, and folder below the root, as in the original's README.
COLUMNS = {
    'imagenet': ('IN-1K', 'imagenet-1k'),
    'imagenet-real': ('IN-ReaL', 'imagenet-1k'),
    'imagenetv2': ('IN-V2', 'imagenetv2'),
    'imagenet_a': ('IN-A', 'imagenet-a'),
    'imagenet_r': ('IN-R', 'imagenet-r'),
    'imagenet_sketch': ('IN-Sketch', 'imagenet-sketch'),
}
RESULT = 'result.json'  # in --output
_NONE = '-'  # in a cell of a data set that was not evaluated


def choose_paths(root: str | None, named: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The folder of each data set to evaluate.

    Args:
        root: a folder laid out as the original's ``data/``; None: only what is named.
        named: words ``DATASET=PATH``; they win over the root.

    Returns:
        DATA.DATASET -> path, in the order of the table; and the data sets that the root lacks.

    Raises:
        ConfigError: for an unknown data set, and where nothing is left to evaluate.
    """
    paths, lacking = {}, []
    for dataset, (_, folder) in COLUMNS.items() if root is not None else ():
        if (path := Path(root or '', folder)).is_dir():
            paths[dataset] = str(path)
        else:
            lacking.append(dataset)
    for word in named:
        dataset, equals, where = word.partition('=')
        if dataset not in COLUMNS or not equals or not where:
            raise ConfigError(
                f'{word}: is not DATASET=PATH with one of the data sets {", ".join(COLUMNS)}'
            )
        paths[dataset] = where
    if not paths:
        folders = ', '.join(dict.fromkeys(folder for _, folder in COLUMNS.values()))
        raise ConfigError(
            f'--data {root}: has none of the folders {folders}'
            if root is not None
            else 'nothing to evaluate: give --data ROOT, or --variants DATASET=PATH ...'
        )
    lacking = [dataset for dataset in lacking if dataset not in paths]
    return {dataset: paths[dataset] for dataset in COLUMNS if dataset in paths}, lacking


def as_table(result: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The table of a result of `program.evaluate_variants`: top-1 accuracies, percent."""
    titles = ['model', *(title for title, _ in COLUMNS.values())]
    rows = [[row['name'], *_cells(row['results'])] for row in result['rows']]
    if not markdown:
        return table(titles, rows, right=titles[1:])
    lines = [['model name', *titles[1:]], ['---', *([':---:'] * len(COLUMNS))], *rows]
    return '\n'.join(f'| {" | ".join(cell.replace("|", "/") for cell in line)} |' for line in lines)


def _cells(results: Mapping[str, Any]) -> list[str]:
    return [
        f'{results[dataset]["acc1"]:.1f}' if dataset in results else _NONE for dataset in COLUMNS
    ]
