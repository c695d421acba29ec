"""The outline of a file of torch.save: all of it but the tensors' values.

Reading a file as data (`read_shard`) makes a tensor of each entry, which takes as long as writing
some of them. The outline has tensors without memory in their place, and is made by Python's own
unpickler, which is allowed nothing but what stands here: inert names. Where a file needs more than
that, `read_shard` itself decides.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from internvl_ds.checkpoint.formats.shard_files import read_shard
from internvl_ds.checkpoint.formats.tensor_files import pickle_of
from internvl_ds.errors import CheckpointError
from internvl_ds.files.reading import Unreadable, open_data, require_bounded


def outline(path: Path) -> Any:
    """The content of a file, its tensors on the meta device; tensors of one number become 0.

    CheckpointError as `read_shard`, for a file that it would refuse.
    """
    try:
        with open_data(path) as file:
            content = _Unpickler(io.BytesIO(pickle_of(file))).load()
        require_bounded(content)
        return content
    except Unreadable as error:  # as that reader would find, after as long again
        raise CheckpointError(f'{path}: cannot be read: {error}') from error
    except Exception:  # whatever it is, the reader that counts has the last word
        return read_shard(path, mmap=True)


class _Inert:
    """Stands for an object of a class that the reader allows: takes all that a pickle gives it."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor(dtype: torch.dtype, offset: int, size: Any, *rest: Any) -> torch.Tensor:
    if not size:  # a step counter may be asked for its value
        return torch.zeros((), dtype=dtype)
    return torch.empty(size, dtype=dtype, device='meta')


def _parameter(tensor: torch.Tensor, *rest: Any) -> torch.Tensor:
    return tensor


def _with_attributes(make: Any, kind: Any, arguments: Any, state: Any) -> torch.Tensor:
    if make is not _tensor or kind is not torch.Tensor:
        raise pickle.UnpicklingError('a subclass of Tensor')
    return _tensor(*arguments)


# What shards are made of. All of it is allowed by torch itself or by `allowed_globals`.
_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ('torch._utils', '_rebuild_tensor_v2'): _tensor,
    ('torch._utils', '_rebuild_parameter'): _parameter,
    ('torch._tensor', '_rebuild_from_type_v2'): _with_attributes,
    ('torch', 'Tensor'): torch.Tensor,
    ('torch', 'Size'): tuple,
    ('collections', 'OrderedDict'): OrderedDict,
    ('__builtin__', 'set'): set,  # so it is named in the protocol of torch.save
    ('deepspeed.runtime.zero.config', 'ZeroStageEnum'): int,
    ('deepspeed.runtime.fp16.loss_scaler', 'LossScaler'): _Inert,
    ('deepspeed.runtime.fp16.loss_scaler', 'DynamicLossScaler'): _Inert,
    ('deepspeed.utils.tensor_fragment', 'fragment_address'): _Inert,
}


# How a pickle names a tensor's dtype.
_STORAGES = {
    'DoubleStorage': torch.float64, 'FloatStorage': torch.float32, 'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool, 'ComplexFloatStorage': torch.complex64,
    'ComplexDoubleStorage': torch.complex128,
}  # fmt: skip

_DTYPES = frozenset({'float16', 'bfloat16', 'float32', 'float64'})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and name in _STORAGES:
            return _STORAGES[name]
        if module == 'torch' and name in _DTYPES:
            return getattr(torch, name)
        return _KNOWN[module, name]

    def persistent_load(self, entry: Any) -> torch.dtype:
        kind, dtype, *_ = entry
        if kind != 'storage':
            raise pickle.UnpicklingError(f'{kind} is no storage')
        return dtype
