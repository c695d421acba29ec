"""What a PyTorch file may name beside tensors and plain types, and the error if it names more.

Every reader of the package allows this one list, and a save proves its files against it. No code of
a file runs: the entries are data classes of DeepSpeed, the two configuration classes that public
classification checkpoints carry, and members of the enums among them.
"""

from __future__ import annotations

import argparse
import enum
import pickle
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import _weights_only_unpickler

# What `torch.serialization.safe_globals` takes.
Allowed = list[Callable[..., Any] | tuple[Callable[..., Any], str]]

# How torch's unpickler names what it refuses.
_REFUSALS = (
    re.compile(r'GLOBAL (\S+) was not an allowed global'),
    re.compile(r'unsupported GLOBAL (\S+) whose module'),
    re.compile(r"but got <class '([^']+)'>"),
    re.compile(r'unrecognized function (.+)'),
)


@cache
def allowed_globals() -> Allowed:
    """The classes and functions that a file may name, for `torch.serialization.safe_globals`."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    return [
        LossScaler,
        DynamicLossScaler,
        fragment_address,
        *_enums(),
        # Python 3.11.0 to 3.11.3 pickle a member of an enum as a call of getattr.
        (_enum_member, 'builtins.getattr'),
        argparse.Namespace,
        # torch's restricted unpickler fills only the built-in dictionaries, so a CfgNode is read as
        # an OrderedDict: code of yacs never runs while a file is being read.
        (OrderedDict, 'yacs.config.CfgNode'),
    ]


@contextmanager
def allowing() -> Iterator[None]:
    """Allows torch.load, meanwhile, `allowed_globals` only, without bytes made from a number.

    torch keeps its list for the whole process, and a thread that leaves takes its entries away from
    the others: one thread at a time reads, where several verify or save.
    """
    with _reading, torch.serialization.safe_globals(allowed_globals()), _bound_builtins():
        yield


_reading = threading.Lock()


@contextmanager
def _bound_builtins() -> Iterator[None]:
    """Puts functions that copy in the place of two of torch's own list that can grow."""
    table = _weights_only_unpickler._get_allowed_globals()
    copies = {'builtins.bytearray': _bytearray, '_codecs.encode': _encode}
    before = {name: table[name] for name in copies.keys() & table.keys()}
    table.update({name: copies[name] for name in before})
    try:
        yield
    finally:
        table.update(before)


def _bytearray(data: bytes | str = b'', encoding: str = '') -> bytearray:
    """Stands for ``bytearray`` in a file, which makes any number of zeros of an int."""
    return bytearray(_encode(data, encoding) if isinstance(data, str) else memoryview(data))


def _encode(text: str, encoding: str) -> bytes:
    """Stands for ``_codecs.encode`` in a file, as pickle writes bytes by it."""
    if not isinstance(text, str) or encoding not in ('latin1', 'latin-1'):
        raise pickle.UnpicklingError(f'unrecognized function encode to {str(encoding)[:30]}')
    return text.encode('latin-1')


def refused_class(error: Exception) -> str | None:
    """The class or function for which torch refused a file; None where it failed otherwise."""
    matches = (pattern.search(str(error)) for pattern in _REFUSALS)
    return next((match.group(1) for match in matches if match), None)


def reason_of(error: Exception) -> str:
    """Why torch could not read a file, without its advice to switch weights_only off."""
    # torch wraps the cause, a paragraph of its own, in that advice.
    paragraphs = str(error).strip().split('\n\n')
    return ' '.join((paragraphs[-2] if len(paragraphs) > 2 else paragraphs[0]).split())


class _PortablePickler(pickle.Pickler):
    """Writes a member of an enum as a call of its class, as every Python but 3.11.0-3.11.3 does."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return type(value), (value.value,)
        return NotImplemented


class PortablePickle:
    """A ``pickle_module`` for `torch.save`: the same bytes under every Python."""

    __name__ = 'pickle'
    Pickler = _PortablePickler


@cache
def _enums() -> tuple[type[enum.Enum], ...]:
    """The enums that DeepSpeed pickles into its shards."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return (ZeroStageEnum,)


def _enum_member(owner: Any, name: Any) -> enum.Enum:
    """Stands for ``getattr`` in a file: a member of one of `_enums`, and nothing else."""
    if not any(owner is kind for kind in _enums()) or name not in owner.__members__:
        raise pickle.UnpicklingError(f'unrecognized function getattr of {owner} and {name!r}')
    return owner.__members__[name]
