"""Weight files opened as mappings: ``.pth`` and its kin, ``.safetensors``, and https URLs.

Nothing in a file is ever run: PyTorch files go through ``weights_only``, which rebuilds tensors,
plain containers and the two configuration classes that public classification checkpoints carry.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors
import safetensors.torch
import torch
from yacs.config import CfgNode

from internvl_ds.errors import PretrainedError

_READABLE = '.pth, .pt, .bin and .safetensors files are read'
_ZIP_MAGIC = b'PK\x03\x04'

# torch's restricted unpickler fills only the built-in dictionaries, so a CfgNode is read as an
# OrderedDict and turned back afterwards: code of yacs never runs while a file is being read.
_ALLOWED_CLASSES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (OrderedDict, 'yacs.config.CfgNode'),
    argparse.Namespace,
]

# How torch's unpickler names what it refuses.
_REFUSALS = (
    re.compile(r'GLOBAL (\S+) was not an allowed global'),
    re.compile(r'unsupported GLOBAL (\S+) whose module'),
    re.compile(r"but got <class '([^']+)'>"),
    re.compile(r'unrecognized function (.+)'),
)

_log = logging.getLogger(__name__)


def open_source(path: str) -> Mapping[str, Any]:
    """Opens a weight file on the CPU and returns its whole top-level object, not unwrapped.

    Zip-format PyTorch files are mapped, not read: a tensor costs memory once it is used. Every
    rank that calls this opens the file for itself.

    Args:
        path: A file, or an ``https://`` URL. The hash that a URL's file name ends in
            (``name-0123abcd.pth``) is checked when it is downloaded.

    Returns:
        A mapping of tensors or of nested objects. A yacs CfgNode at its top level (``config`` in
        the original's checkpoints) is a CfgNode again, frozen if it was saved frozen.

    Raises:
        PretrainedError: where there is no such file, or it cannot be read, or holds objects of a
            class that is not allowed, or is not a mapping; the path and the reason are named.
    """
    if path.startswith('https://'):
        source = _read(path, _download)
    elif path.startswith('http://'):
        raise PretrainedError(f'{path}: plain http can be altered on its way; use https')
    else:
        _require_file(path)
        is_safetensors = Path(path).suffix == '.safetensors'
        source = _read(path, _read_safetensors if is_safetensors else _read_torch)
    if not isinstance(source, Mapping):
        kind = type(source).__name__
        raise PretrainedError(f'{path}: holds a {kind}, not a mapping of names to tensors')
    return source


def _require_file(path: str) -> None:
    if not path:
        raise PretrainedError('the path of the weights is empty')
    if Path(path).is_dir():
        raise PretrainedError(f'{path}: is a directory; {_READABLE}')
    if not Path(path).is_file():
        raise PretrainedError(f'{path}: no such file')


def _read(path: str, reader: Callable[[str], Any]) -> Any:
    """Runs a reader; whatever a broken or hostile file makes it raise becomes one error."""
    try:
        with torch.serialization.safe_globals(_ALLOWED_CLASSES):
            return _restore_configs(reader(path))
    except pickle.UnpicklingError as error:
        refused = _refused_class(str(error))
        if refused is None:
            raise PretrainedError(_unreadable(path, _torch_reason(str(error)))) from error
        raise PretrainedError(
            f'{path}: holds an object of {refused}, which is refused: it could run code of its '
            f'own when it is read. If you trust the file, read it once yourself and save the '
            f'weights alone with torch.save'
        ) from error
    # A damaged legacy pickle can raise nearly anything (KeyError, struct.error, ...).
    except Exception as error:
        reason = f'{type(error).__name__}: {error}'
        raise PretrainedError(_unreadable(path, reason)) from error


def _read_torch(path: str) -> Any:
    with open(path, 'rb') as file:  # noqa: PTH123
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    # Files from before torch 1.6 are one pickle stream, which cannot be mapped.
    return torch.load(path, map_location='cpu', weights_only=True, mmap=is_zip)


def _read_safetensors(path: str) -> Any:
    return safetensors.torch.load_file(path, device='cpu')


def _download(url: str) -> Any:
    name = Path(urlparse(url).path).name
    if torch.hub.HASH_REGEX.search(name) is None:
        _log.warning(f'{url}: its name ends in no hash, so what comes cannot be checked')
    return torch.hub.load_state_dict_from_url(
        url, map_location='cpu', check_hash=True, weights_only=True
    )


def _restore_configs(source: Any) -> Any:
    """Makes the top-level values that were written as CfgNodes CfgNodes again."""
    if not isinstance(source, dict):
        return source
    for key, value in source.items():
        state = getattr(value, '__dict__', {})
        if type(value) is OrderedDict and CfgNode.IMMUTABLE in state:
            config = CfgNode(value)
            if state[CfgNode.IMMUTABLE]:
                config.freeze()
            source[key] = config
    return source


def _refused_class(message: str) -> str | None:
    found = (pattern.search(message) for pattern in _REFUSALS)
    return next((match.group(1) for match in found if match), None)


def _torch_reason(message: str) -> str:
    # torch wraps the cause, a paragraph of its own, in advice to switch weights_only off.
    paragraphs = message.strip().split('\n\n')
    return paragraphs[-2] if len(paragraphs) > 2 else paragraphs[0]


def _unreadable(path: str, reason: str) -> str:
    return f'{path}: cannot be read ({reason}); {_READABLE}'
