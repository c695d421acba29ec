"""state.json: what a tag keeps beside DeepSpeed's shards, as text that reads back exactly."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from internvl_ds.checkpoint.tag.discovery import read_manifest
from internvl_ds.checkpoint.tag.identity import require_identity
from internvl_ds.checkpoint.tag.manifest import STATE_FILE, Identity
from internvl_ds.errors import CheckpointError, brief
from internvl_ds.files.reading import interpreting, read_json

# A dict with this single key stands for what JSON has no type for.
_MARK = '__internvl_ds__'


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda v: v is None or (isinstance(v, kinds) and not isinstance(v, bool))


def _of_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_number(value: Any, least: float) -> bool:
    return _is(int, float)(value) and least <= value < math.inf


def _is_position(value: Any) -> bool:
    """Whether it is what `LrSchedule.state_dict` gave, or nothing."""
    if value is None:
        return True
    has_unit = value.get('counts', 'updates') in ('updates', 'micro-batches', 'original')
    move = value.get('moved', value['position'])
    return has_unit and _is_number(value['group'], 1) and _is_number(value['position'] + move, -2)


def _is_scale(value: Any) -> bool:
    """Whether it is the state of a loss scaler, or nothing."""
    if not value:
        return value is None or value == {}
    others = {key: v for key, v in value.items() if key not in ('micro_batches', 'idle')}
    count = value.get('micro_batches')
    is_whole = (count is None or _is_number(count, 0)) and _of_names(value.get('idle'))
    return value['scale'] > 0 and is_whole and all(_is_number(n, 0) for n in others.values())


# What state.json and loop_rank_*.json hold of each key, where they hold something.
_KINDS: dict[str, Callable[[Any], bool]] = {
    'epoch': lambda v: _is(str)(v) or (_is_number(v, -1) and v < 1 << 53),
    'step': lambda v: v is None or (_is(int)(v) and 0 <= v < 1 << 53),
    **dict.fromkeys(
        ('max_accuracy', 'max_accuracy_ema', 'ema_decay'),
        lambda v: v is None or isinstance(float(v), float),
    ),
    **dict.fromkeys(('config', 'optimizer_class'), _is(str)),
    'lr_scheduler': _is(dict),
    'scaler': lambda v: _is(dict)(v) and ('scale' not in (v or {}) or _is_scale(v)),
    'loss_scale': _is_scale,
    'schedule': _is_position,
    'class_names': _of_names,
    'idle': _of_names,
    'optimizer_groups': lambda v: v is None or (isinstance(v, list) and all(map(_of_names, v))),
}


def state_text(state: dict[str, Any]) -> str:
    """``state`` (nested plain Python values) as the content of state.json.

    CheckpointError, naming its place, for a value that would not read back as it was.
    """
    return json.dumps(_encode(state, 'state.json'), indent=1) + '\n'


def read_state(path: Path) -> dict[str, Any]:
    """Reads a file that holds what `state_text` gave; CheckpointError for any other."""
    try:
        tree = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{path}: cannot be read: {error}') from error
    with interpreting(path, CheckpointError):
        state = _decode(tree)
        if not isinstance(state, dict):
            raise TypeError(f'{brief(state)} is no object')
    require_state(state, path)
    return state


def require_state(state: Mapping[str, Any], where: object) -> None:
    """Raises CheckpointError for the first value of a kind that training cannot go on with."""
    for key, is_one in _KINDS.items():
        with interpreting(f'{where}: {key} is {brief(state.get(key))}', CheckpointError):
            if not is_one(state.get(key)):
                raise TypeError('of another kind')


def state_of(tag: Path) -> dict[str, Any]:
    """What a tag's state.json keeps; empty for a tag of plain DeepSpeed; see `read_own`."""
    return read_own(tag, STATE_FILE) or {}


def read_own(tag: Path, name: str) -> dict[str, Any] | None:
    """Reads one of a tag's files of text, or None where it has none of that name.

    CheckpointError as `read_state`, and for a file of another rank or another save.
    """
    manifest = read_manifest(tag)
    if manifest is None:
        return read_state(tag / name) if (tag / name).exists() else None
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
