"""Compares the class names that weights were trained on with the current ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from yacs.config import CfgNode

from internvl_ds.checkpoint.formats.state_json import state_of
from internvl_ds.checkpoint.formats.tensor_files import open_safetensors
from internvl_ds.checkpoint.sources.open_weights import open_weights
from internvl_ds.checkpoint.tag import discovery
from internvl_ds.checkpoint.tag.manifest import STATE_FILE
from internvl_ds.checkpoint.tag.verify import damage
from internvl_ds.config.tree import get_option
from internvl_ds.errors import CheckpointError, CheckpointMismatch, PretrainedError, brief, few
from internvl_ds.files.reading import parse_json, read_json


def require_same_classes(
    config: CfgNode, now: Sequence[str], where: str, logger: logging.Logger
) -> None:
    """Compares class names, in order, with the class names saved with the weights, if any.

    Args:
        config: DATA.CHECK_CLASS_NAMES is read; False makes the error a warning.
        now: the names of the data's labels 0, 1, ...; none: nothing is compared.
        where: the weights, as `saved_classes` takes them.
        logger: gets that warning.

    Raises:
        CheckpointMismatch: names the first difference.
    """
    old_names = saved_classes(where)
    if not old_names or not now or old_names == list(now):
        return
    pairs = zip([*old_names, None], [*now, None], strict=False)
    label, (old, new) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    message = (
        f'{where}: trained on other classes than those of now: class {label} was '
        f'{_quote(old)}, and is {_quote(new)} ({len(old_names)} classes then, {len(now)} now'
    )
    for what, names, others in (('gone', old_names, set(now)), ('new', now, set(old_names))):
        changes = [name for name in names if name not in others]
        message += f'; {what}: {few(changes)}' if changes else ''
    message += ')'
    if get_option(config, 'DATA.CHECK_CLASS_NAMES', True):
        raise CheckpointMismatch(
            f'{message}. Give the class folders their names of then, or set '
            'DATA.CHECK_CLASS_NAMES False to use the weights for the classes of now'
        )
    logger.warning('%s; DATA.CHECK_CLASS_NAMES is False', message)


def saved_classes(where: str) -> list[str] | None:
    """The class names in a tag, or in a file exported from one; else None.

    None also for what cannot be read: the load that follows says so. CheckpointError when a tag's
    state.json is not what was written, or the names of a file are no texts.
    """
    path = Path(where)
    if path.is_dir() and discovery.is_tag(path):
        manifest = discovery.read_manifest(path)
        damages = damage(path, manifest, [STATE_FILE]) if manifest is not None else []
        if damages:
            raise CheckpointError('; '.join(damages))
        names = state_of(path).get('class_names')
    else:
        try:
            names = _in_file(where)
        except (OSError, LookupError, TypeError, ValueError, SafetensorError, PretrainedError):
            return None
    if not isinstance(names, list | tuple):
        return None
    if odd := [name for name in names if not isinstance(name, str)]:
        raise CheckpointError(f'{where}: class_names holds {brief(odd[0])}, which is no name')
    return list(names)


def _in_file(where: str) -> Any:
    path = Path(where)
    if path.is_dir():
        path = min(path.glob('*.index.json'))
    if path.name.endswith('.index.json'):
        return read_json(path)['metadata']['class_names']
    if path.suffix == '.safetensors' and path.is_file():
        with open_safetensors(path) as file:
            return parse_json(file.metadata()['class_names'])
    return open_weights(where).get('class_names')


def _quote(name: str | None) -> str:
    return 'none' if name is None else brief(name)
