"""Builds a model in slices for ZeRO stage 3: the values of a whole build, in 1/N of its memory.

``deepspeed.zero.Init`` cuts a parameter up when its module's constructor ends, and makes it in half
precision. What a parent's constructor then does to it (timm's ``init_weights``) is lost, and random
numbers are others. Here every function of torch finds whole parameters in float32, on the CPU: the
few that were touched last are whole, each other one is a slice, and is made whole when a function
asks for it. All ranks run the same constructors, and so touch the same parameters in one order.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from yacs.config import CfgNode

from internvl_ds.config.choices import require_one_of
from internvl_ds.config.tree import get_option
from internvl_ds.errors import ConfigError
from internvl_ds.zero.parameters import is_sharded, own_slice, whole_numel

AUTO, ALWAYS, NEVER = 'auto', 'always', 'never'
# Bytes of float32 parameters from which on AUTO builds in slices.
LIMIT = 2 << 30
# Bytes of small parameters that may be whole beside the largest one.
_SLACK = 1 << 20
# The C library maps memory of so many bytes and more, and unmaps it when it is free. By itself it
# raises that to what it was given back, and whole parameters leave holes that no other fits into.
_M_MMAP_THRESHOLD = -3
_MAPPED = 32 << 20  # what it comes to by itself, at the most
_TRIMMED = 16 << 20  # bytes after which it is to give back what is free all the same
_REMEDY = "set TRAIN.SHARDED_BUILD 'never' to build the whole model on every rank"
_HALVES = (torch.float32, torch.float16, torch.bfloat16)  # what DeepSpeed casts to half precision

_T: Any = Tensor  # whose properties are descriptors, which its type does not say

# Functions that replace all the values of their first argument: those before are not gathered.
_OVERWRITING = frozenset(
    {
        Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_, Tensor.copy_,
        _T.data.__set__, nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.ones_,
        nn.init.zeros_, nn.init.kaiming_uniform_, nn.init.kaiming_normal_,
    }
)  # fmt: skip
# Functions that ask for nothing that a slice does not have too.
_OF_SLICES = frozenset(
    {
        _T.requires_grad.__get__, _T.requires_grad.__set__, Tensor.requires_grad_,
        _T.dtype.__get__, _T.device.__get__, _T.is_leaf.__get__, _T.grad.__get__,
        _T.grad_fn.__get__, _T.is_meta.__get__, _T.layout.__get__, Tensor.is_floating_point,
        Tensor.is_complex,
    }
)  # fmt: skip
_OF_SHAPES: Mapping[Any, Any] = {
    _T.shape.__get__: lambda shape: shape,
    Tensor.size: lambda shape, dim=None: shape if dim is None else shape[dim],
    Tensor.dim: len,
    _T.ndim.__get__: len,
    Tensor.numel: lambda shape: shape.numel(),
}


class ShardedBuild(TorchFunctionMode):
    """Within the block, constructed modules get slices for parameters.

    Collective: every rank constructs the same in it. Then every rank calls `finish`, may load
    weights, and calls `cast` before ``deepspeed.initialize``.

    Attributes:
        active: whether parameters are cut up by now.
    """

    def __init__(self, ds_config: Mapping[str, Any], above: int) -> None:
        """Starts without partitioned parameters.

        Args:
            ds_config: resolved, of ZeRO stage 3.
            above: bytes of parameters from which on they are cut up.
        """
        super().__init__()
        self.active = False
        self._ds_config, self._above = dict(ds_config), above
        self._init: Any = None
        # Whole ones and the bytes of each, the one touched last at the end.
        self._open: dict[int, tuple[Any, int]] = {}
        self._bytes = self._seen = self._largest = self._freed = 0
        self._digest = 0  # of all the values that were cut up, the same on all ranks

    def __enter__(self) -> ShardedBuild:
        global _present
        self._hook = register_module_parameter_registration_hook(self._registered)
        _present = self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        global _present
        _present = None
        self._hook.remove()
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        touched = [t for t in _tensors((args, kwargs)) if is_sharded(t)] if self.active else []
        if not touched or func in _OF_SLICES:
            return func(*args, **kwargs)
        if func in _OF_SHAPES and args and is_sharded(args[0]) and id(args[0]) not in self._open:
            return _OF_SHAPES[func](torch.Size(args[0].ds_shape), *args[1:], **kwargs)
        first = args[0] if args else None
        overwritten = func in _OVERWRITING and [t for t in touched if t is first] == touched
        for parameter in touched:
            self._touch(parameter, touched, filled=not overwritten)
        return func(*args, **kwargs)

    def finish(self, model: nn.Module) -> bool:
        """Partitions the rest. Collective: every rank calls it, after the build.

        Returns:
            Whether the model's parameters are slices; False for a model smaller than ``above``.
        """
        if not self.active:
            self._open.clear()
            return False
        self.settle()
        for parameter in model.parameters():
            if not is_sharded(parameter):  # it came by another way than a module's attribute
                self._close(parameter)
        _call_c('mallopt', _M_MMAP_THRESHOLD, _MAPPED)
        _call_c('malloc_trim', 0)
        return True

    def digest(self, model: nn.Module) -> int:
        """A number that differs between ranks whose constructors have made other values."""
        return hash((self._digest, *(_sum(buffer) for buffer in model.buffers())))

    def settle(self) -> None:
        """Partitions every parameter that is whole, also if something holds views of it."""
        for parameter, _ in list(self._open.values()) if self.active else ():
            self._close(parameter)

    def cast(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        """Gives the slices dtype and device of the engine that comes next; buffers the device.

        Args:
            dtype: of an engine in half precision; None for float32.
        """
        init, own = self._init, get_accelerator().current_device_name()
        if init.remote_device == 'cpu' and not self._offloads():
            init.remote_device = init.local_device
        if init.mem_efficient_linear and hasattr(init, '_enable_mem_efficient_linear'):
            # As DeepSpeed does where it cuts a whole model up; before 0.19 it did so by itself.
            init._enable_mem_efficient_linear()
        parameter: Any
        for parameter in model.parameters():
            kind = dtype if dtype is not None and parameter.dtype in _HALVES else parameter.dtype
            place = parameter.ds_tensor.device if self._offloads() else own
            parameter.ds_tensor.data = parameter.ds_tensor.data.to(place, kind)
            parameter.data = torch.empty(0, dtype=kind, device=own)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(own)

    def _offloads(self) -> bool:
        section = self._ds_config['zero_optimization'].get('offload_param') or {}
        return section.get('device', 'none') not in (None, 'none')

    def _registered(self, module: nn.Module, name: str, parameter: Any) -> None:
        """Tracks each parameter that is assigned to a module."""
        if parameter is None or is_sharded(parameter) or id(parameter) in self._open:
            return
        with torch._C.DisableTorchFunction():
            if is_lazy(parameter) or parameter.is_meta:
                return
            size = _bytes_of(parameter)
            self._seen, self._largest = self._seen + size, max(self._largest, size)
            if not self.active and self._seen > self._above:
                _call_c('mallopt', _M_MMAP_THRESHOLD, _SLACK)
                self._init, self.active = self._begin(), True
            self._hold(parameter, [parameter])

    def _begin(self) -> Any:
        zero = self._ds_config['zero_optimization']
        return deepspeed.zero.Init(
            config_dict_or_path={
                'train_micro_batch_size_per_gpu': 1,
                'zero_optimization': {k: v for k, v in zero.items() if v != 'auto'},
            },
            remote_device='cpu',
            dtype=torch.float32,
        )

    def _touch(self, parameter: Any, pinned: list[Any], filled: bool) -> None:
        if id(parameter) in self._open:
            self._open[id(parameter)] = self._open.pop(id(parameter))
            return
        self._hold(parameter, pinned)
        whole = torch.empty(tuple(parameter.ds_shape), dtype=parameter.ds_tensor.dtype)
        if filled:
            _gather(parameter, whole.view(-1))
        parameter.data, parameter.ds_status = whole, ZeroParamStatus.AVAILABLE

    def _hold(self, parameter: Any, pinned: list[Any]) -> None:
        """Frees memory for a whole parameter, and counts it."""
        size, kept = _bytes_of(parameter), {id(p) for p in pinned}
        limit = self._largest + _SLACK - size
        for other, _ in list(self._open.values()) if self.active else ():
            if self._bytes <= limit:
                break
            if id(other) not in kept and not _is_viewed(other):
                self._close(other)
        self._open[id(parameter)] = parameter, size
        self._bytes += size

    def _close(self, parameter: Any) -> None:
        """Puts this rank's elements into its slice, and frees the rest."""
        with torch.no_grad(), torch._C.DisableTorchFunction():
            self._bytes -= self._open.pop(id(parameter), (None, 0))[1]
            self._digest = hash((self._digest, _sum(parameter)))
            if not is_sharded(parameter):
                self._init._convert_to_deepspeed_param(parameter)
            elif parameter.shape != parameter.ds_shape:
                raise ConfigError(
                    f'a parameter of shape {tuple(parameter.ds_shape)} is given the shape '
                    f'{tuple(parameter.shape)} while the model is built, which cannot be done in '
                    f'slices: {_REMEDY}'
                )
            elif parameter.dtype != parameter.ds_tensor.dtype:
                parameter.ds_tensor.data = parameter.ds_tensor.data.to(parameter.dtype)
            parameter.partition(has_been_updated=True)
            start, stop = own_slice(parameter)
            parameter.ds_tensor[stop - start :].zero_()  # what pads the last slices
            self._freed += _bytes_of(parameter)
            if self._freed > max(self._largest, _TRIMMED):
                self._freed = 0
                _call_c('malloc_trim', 0)


def choose_build(config: CfgNode, ds_config: Mapping[str, Any]) -> ShardedBuild | None:
    """The build that TRAIN.SHARDED_BUILD asks for; None to build the model whole.

    Args:
        config: the yacs tree.
        ds_config: resolved.

    Raises:
        ConfigError: for 'always' where it cannot be, and for another value.
    """
    asked = get_option(config, 'TRAIN.SHARDED_BUILD')
    require_one_of('TRAIN.SHARDED_BUILD', asked, (AUTO, ALWAYS, NEVER))
    reason = why_not_sharded(ds_config)
    if asked == ALWAYS and reason:
        raise ConfigError(f"TRAIN.SHARDED_BUILD 'always': {reason}")
    if asked == NEVER or reason:
        return None
    return ShardedBuild(ds_config, 0 if asked == ALWAYS else LIMIT)


# The build that is going on: its modules are not to be written to in slices before it settles.
_present: ShardedBuild | None = None


def settle() -> None:
    """Partitions the whole parameters of a running build, so that slices can be written."""
    if _present is not None:
        _present.settle()


def why_not_sharded(ds_config: Mapping[str, Any]) -> str:
    """Why a resolved ds_config cannot be built in slices; '' if it can."""
    zero = ds_config['zero_optimization']
    if zero['stage'] != 3:
        return f'/zero_optimization/stage is {zero["stage"]}, and only stage 3 has slices'
    size = zero.get('zero_hpz_partition_size', 1)
    return f'/zero_optimization/zero_hpz_partition_size is {size}' if size != 1 else ''


def _gather(parameter: Any, flat: Tensor) -> None:
    """Fills a flat tensor with the slices of all ranks, one after the other.

    Not by the parameter's own all_gather: its result is held by others for a while, and lies on the
    accelerator. Collective: every rank calls it.
    """
    own, group = parameter.ds_tensor, parameter.ds_process_group
    here, length = get_accelerator().current_device_name(), own.numel()
    for source in range(math.ceil(flat.numel() / length)):
        is_own = source == dist.get_rank(group)
        # The group may know tensors of the accelerator only.
        part = own.to(here) if is_own else torch.empty(length, dtype=own.dtype, device=here)
        dist.broadcast(part, dist.get_global_rank(group, source), group)
        rest = flat[source * length :][:length]
        rest.copy_(part[: rest.numel()])


def _call_c(name: str, *arguments: int) -> None:
    with contextlib.suppress(AttributeError, OSError):  # another C library
        getattr(ctypes.CDLL(None), name)(*arguments)


def _bytes_of(parameter: Any) -> int:
    return int(whole_numel(parameter) * parameter.element_size())


def _is_viewed(parameter: Any) -> bool:
    """Whether anything else holds the memory of a whole parameter, and may write to it.

    Not what is garbage: Python collects that at another time on each rank, which have to agree.
    """
    storage = parameter.untyped_storage()
    alone = 2  # the parameter's and this one
    if torch._C._storage_Use_Count(storage._cdata) > alone:
        gc.collect()
    return torch._C._storage_Use_Count(storage._cdata) > alone


def _sum(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8)
    # In parts: each is copied to 64 bits.
    return sum(int(part.sum(dtype=torch.int64)) for part in bits.split(1 << 16))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
