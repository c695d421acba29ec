"""Weights opened as mappings: files of PyTorch and safetensors, and directories of them.

A value is a tensor mapped from its file, and read when it is used. Nothing in a file is ever run:
PyTorch files go through ``weights_only``, which rebuilds tensors, plain containers and the two
configuration classes that public classification checkpoints carry.
"""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from internvl_ds.checkpoint.formats.allowed import reason_of, refused_class
from internvl_ds.checkpoint.formats.tensor_files import load_safetensors, load_torch
from internvl_ds.checkpoint.sources import downloads
from internvl_ds.checkpoint.tag.discovery import is_tag
from internvl_ds.errors import PretrainedError, few
from internvl_ds.files.reading import YAML_VALUES, read_json, require_bounded

_READABLE = (
    '.pth, .pt, .bin and .safetensors files are read, directories of them with an index, and tags'
)


def open_file(path: str) -> Mapping[str, Any]:
    """Opens weights on the CPU: the whole top-level object, mapped and not read where it can be.

    Args:
        path: a local file, or a directory with an index (``*.index.json``) of .safetensors or .bin
            files, or with one file as Hugging Face names it.

    Returns:
        A mapping of tensors, or of nested objects. A yacs CfgNode at its top level (``config`` in
        the original's checkpoints) is a CfgNode again, frozen if it was saved so.

    Raises:
        PretrainedError: naming the path and the reason, for what is no such file, is no mapping,
            cannot be read or holds objects of a class that is not allowed.
    """
    if os.path.isdir(path):
        try:
            return _open_directory(Path(path))
        except OSError as error:
            raise PretrainedError(f'{path}: cannot be read: {error}') from error
    try:
        source = _open_file(path)
    except PretrainedError as error:
        if not downloads.is_in_cache(Path(path)):
            raise
        raise PretrainedError(f'{error}. Remove that file, and it is downloaded again') from error
    if not isinstance(source, Mapping):
        kind = type(source).__name__
        raise PretrainedError(f'{path}: holds a {kind}, not a mapping of names to tensors')
    return source


def _open_file(path: str) -> Any:
    if not os.path.exists(path):
        raise PretrainedError(f'{path}: no such file')
    if path.endswith('.index.json'):
        return _open_index(Path(path))
    return _read(path, load_safetensors if path.endswith('.safetensors') else load_torch)


def _open_directory(path: Path) -> Mapping[str, Any]:
    indexes = sorted(path.glob('*.index.json'))
    if len(indexes) > 1:  # the same weights in two formats
        indexes = [p for p in indexes if 'safetensors' in p.name] or indexes
    if indexes:
        return _open_index(indexes[0])
    for name in ('model.safetensors', 'pytorch_model.bin'):
        if (path / name).exists():
            return open_file(str(path / name))
    tags = [p.name for p in sorted(path.iterdir()) if p.is_dir() and is_tag(p)]
    raise PretrainedError(
        f'{path}: is a directory without an index; '
        + (f'name one of its tags: {few(tags)}' if tags else _READABLE)
    )


def _open_index(path: Path) -> dict[str, Any]:
    """The tensors of all the files that an index names, which must lie beside it."""
    try:
        places = read_json(path)['weight_map']
        files = sorted({str(file) for file in places.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PretrainedError(f'{path}: is no index of weights: {error!r}') from error
    if not files:
        raise PretrainedError(f'{path}: is no index of weights: its weight_map is empty')
    strangers = [f for f in files if Path(f).name != f or f in ('', '..') or f.endswith('.json')]
    if strangers:
        raise PretrainedError(
            f'{path}: names {strangers[0]!r}, which is no file of weights beside it'
        )
    contents = {file: open_file(str(path.parent / file)) for file in files}
    gaps = [key for key, file in places.items() if key not in contents[file]]
    if gaps:
        raise PretrainedError(
            f'{path}: {len(gaps)} of its keys are not where it says: {gaps[0]} in {places[gaps[0]]}'
        )
    return {key: contents[file][key] for key, file in places.items()}


def _read(path: str, reader: Callable[[str], Any]) -> Any:
    """Runs a reader; any exception from a broken or hostile file becomes one error."""
    try:
        return _restore_configs(reader(path))
    # A damaged legacy pickle can raise nearly anything (KeyError, struct.error, ...).
    except Exception as error:
        is_refusal = isinstance(error, pickle.UnpicklingError)
        if is_refusal and (class_name := refused_class(error)):
            raise PretrainedError(
                f'{path}: holds an object of {class_name}, which is refused: it could run code of '
                'its own when it is read. If you trust the file, read it once yourself and save '
                'the weights alone with torch.save'
            ) from error
        reason = reason_of(error) if is_refusal else f'{type(error).__name__}: {error}'
        raise PretrainedError(f'{path}: cannot be read ({reason[:500]}); {_READABLE}') from error


def _restore_configs(source: Any) -> Any:
    """Turns top-level values that were written as CfgNodes into CfgNodes again."""
    for key, value in source.items() if isinstance(source, dict) else ():
        if (config := config_node(value)) is not None:
            source[key] = config
    return source


def config_node(value: Any) -> CfgNode | None:
    """The CfgNode of an OrderedDict that was written as one; else None."""
    state = getattr(value, '__dict__', {})
    if type(value) is not OrderedDict or CfgNode.IMMUTABLE not in state:
        return None
    require_bounded(value, YAML_VALUES)  # each node is copied where it is named
    config = CfgNode(value)
    if state[CfgNode.IMMUTABLE]:
        config.freeze()
    return config
