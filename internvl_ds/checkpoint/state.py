"""state.json: what a tag keeps beside DeepSpeed's shards, as text that reads back exactly."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from internvl_ds.checkpoint.lookup import read_manifest
from internvl_ds.checkpoint.manifest import STATE_FILE, Identity
from internvl_ds.checkpoint.tag_files import require_identity
from internvl_ds.errors import CheckpointError

# A dict with this single key stands for what JSON has no type for.
_MARK = '__internvl_ds__'


def state_text(state: dict[str, Any]) -> str:
    """``state`` (nested plain Python values) as the content of state.json.

    Raises:
        CheckpointError: for a value that would not read back as it was; its place is named.
    """
    return json.dumps(_encode(state, 'state.json'), indent=1) + '\n'


def read_state(path: Path) -> dict[str, Any]:
    """Reads a file that holds what `state_text` gave.

    Raises:
        CheckpointError: when the file cannot be read.
    """
    try:
        return _decode(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{path}: cannot be read: {error}') from error


def state_of(tag: Path) -> dict[str, Any]:
    """What a tag's state.json keeps; empty for a tag of plain DeepSpeed.

    Raises:
        CheckpointError: as `read_own`.
    """
    return read_own(tag, STATE_FILE) or {}


def read_own(tag: Path, name: str) -> dict[str, Any] | None:
    """Reads one of a tag's files of text; None where it has none of that name.

    Raises:
        CheckpointError: as `read_state`, and for a file of another rank or another save.
    """
    manifest = read_manifest(tag)
    if manifest is None:
        return read_state(tag / name) if (tag / name).is_file() else None
    if name not in manifest.files:
        return None
    state = read_state(tag / name)
    require_identity(tag / name, state.get(Identity.KEY), manifest.header)
    return state


def _encode(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.dim() == 0):
        value = value.item()
    if isinstance(value, int | float):
        return value
    if isinstance(value, list):
        return [_encode(v, f'{where}[{i}]') for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {_MARK: 'tuple', 'of': [_encode(v, f'{where}[{i}]') for i, v in enumerate(value)]}
    if type(value) in (dict, OrderedDict, Counter):
        if (
            type(value) is not Counter
            and _MARK not in value
            and all(isinstance(k, str) for k in value)
        ):
            return {k: _encode(v, f'{where}.{k}') for k, v in value.items()}
        pairs = [[_encode(k, where), _encode(v, f'{where}.{k}')] for k, v in value.items()]
        return {_MARK: 'Counter' if type(value) is Counter else 'dict', 'of': pairs}
    raise CheckpointError(
        f'{where} is a {type(value).__name__}, which a checkpoint cannot keep as text; have its '
        'state_dict() return numbers, text, lists and dicts'
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if _MARK not in value:
        return {k: _decode(v) for k, v in value.items()}
    items = _decode(value['of'])
    if value[_MARK] == 'tuple':
        return tuple(items)
    return Counter(dict(items)) if value[_MARK] == 'Counter' else dict(items)
