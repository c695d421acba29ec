"""ds_config JSON files: found by path, or by the name of one that ships, and read."""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_ds.errors import ConfigError, few
from internvl_ds.files.reading import parse_json, read_text

_JSON_BYTES = 1 << 20


def shipped_dir() -> Path:
    """The directory of the ds_configs that ship: inside the wheel, or beside the source."""
    package = Path(__file__).parents[2]
    in_wheel = package / 'ds_configs'
    return in_wheel if in_wheel.is_dir() else package.parent / 'ds_configs'


def load_ds_config(source: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """Reads a ds_config.

    Args:
        source: a JSON path, the name of a shipped one (``zero2`` or ``zero2.json``), a mapping
            (copied, never changed), or None for an empty one.

    Raises:
        ConfigError: when the file is missing, is no JSON object, or states a key twice.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source))
    path = _find(source)

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        duplicates = sorted(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        if duplicates:
            raise ConfigError(f'{path}: key stated twice: {few(duplicates)}')
        return dict(pairs)

    try:
        tree = parse_json(read_text(path, _JSON_BYTES), no_duplicates)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f'{path}: cannot be read as JSON: {error}') from error
    if not isinstance(tree, dict):
        raise ConfigError(f'{path}: holds a {type(tree).__name__}, not a JSON object')
    return tree


def _find(source: str | Path) -> Path:
    folder = shipped_dir()
    for candidate in (Path(source), folder / source, folder / f'{source}.json'):
        try:
            if candidate.exists() and not candidate.is_dir():
                return candidate
        except OSError as error:  # a name that is too long
            raise ConfigError(f'ds_config {str(source)[:60]}...: {error.strerror}') from error
    names = sorted(p.stem for p in folder.glob('*.json'))
    near = difflib.get_close_matches(Path(source).stem, names, n=4, cutoff=0.5) or names
    raise ConfigError(
        f'ds_config {source}: no such file, and none ships by that name; near it: {", ".join(near)}'
    )
