"""The memory of one training step beside the weights, watched on tensors without data.

The step (forward, loss, backward) runs under FakeTensorMode: each operation makes tensors of the
right shapes and dtypes without memory, in the order in which a real step would, and frees them as
it would. A model of 5.9 G parameters takes seconds and no memory.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from internvl_ds.config.ds import resolve as ds
from internvl_ds.errors import ConfigError
from internvl_ds.tools.plan.as_on_cuda import as_on_cuda
from internvl_ds.train.models.batch_norm import SyncBatchNorm

_CHANNELS = 3
_BATCHES = 2, 4  # that are watched; mixup needs even ones

_ENGINE_DTYPES = {ds.BF16: torch.bfloat16, ds.FP16: torch.float16}
_AUTOCAST_DTYPES = {ds.AUTOCAST_BF16: torch.bfloat16, ds.AUTOCAST_FP16: torch.float16}

# Logits of the model in float32, and the teacher's where there is one -> the loss, 0-dim.
Loss = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Timeline:
    """Bytes alive after each operation of a step, without weights and buffers."""

    activations: np.ndarray  # all but finished gradients; float64, one entry an operation
    gradients: np.ndarray  # of the parameters whose gradient is finished; the same length
    forward: int  # how many of the operations are the forward pass, the loss included

    @property
    def saved(self) -> int:
        """Bytes that the forward pass leaves for the backward pass, the loss included."""
        return int(self.activations[self.forward - 1])


@dataclass(frozen=True)
class Step:
    """A training step of any batch, computed from two watched batches.

    Operation by operation, what is alive is a constant and a part that grows with the batch.
    """

    # the steps of the smaller and of the larger batch
    small: Timeline
    large: Timeline
    batches: tuple[int, int]  # images of the two

    def at(self, batch: int) -> Timeline:
        """The step of a micro-batch of ``batch`` images."""
        small, large = self.batches
        per_image = (self.large.activations - self.small.activations) / (large - small)
        activations = self.small.activations + per_image * (batch - small)
        return Timeline(np.maximum(activations, 0.0), self.small.gradients, self.small.forward)

    def activations(self, batch: int) -> int:
        """The most that activations take in the step of ``batch`` images, bytes."""
        return int(self.at(batch).activations.max())


def watch_step(
    model: nn.Module,
    image_size: int,
    precision: str,
    loss_of: Loss,
    *,
    gpu: bool = True,
    teacher: nn.Module | None = None,
) -> Step:
    """Watches a training step, without data and without memory for it.

    Args:
        model: on the meta device, and in the training mode that the run has it in; left as it was.
        image_size: pixels, of square images.
        precision: one of the constants of `ds_config`.
        loss_of: the loss.
        gpu: whether attention and torch.autocast are those of CUDA.
        teacher: as ``model``; what it answers goes to ``loss_of``.

    Raises:
        ConfigError: for a model that cannot run without data.
    """
    try:
        steps = [_watch(model, teacher, n, image_size, precision, loss_of, gpu) for n in _BATCHES]
    except Exception as error:
        raise ConfigError(
            f'the activations of {type(model).__name__} cannot be planned: a step on tensors '
            f'without data ended with {type(error).__name__}: {error}'
        ) from error
    if len({step.activations.shape for step in steps}) > 1:
        # The operations depend on the batch, so they cannot be paired: the peaks are all there is.
        steps = [
            Timeline(s.activations.max(keepdims=True), s.gradients.max(keepdims=True), 1)
            for s in steps
        ]
    return Step(steps[0], steps[1], _BATCHES)


def _watch(
    model: nn.Module,
    teacher: nn.Module | None,
    batch: int,
    side: int,
    precision: str,
    loss_of: Loss,
    gpu: bool,
) -> Timeline:
    # Under torch autocast weights and inputs are float32 too.
    dtype, autocast = _ENGINE_DTYPES.get(precision, torch.float32), _AUTOCAST_DTYPES.get(precision)
    kernels = as_on_cuda() if gpu else nullcontext()
    models = nn.ModuleList([model] if teacher is None else [model, teacher])
    watch = _Watch(models)
    with FakeTensorMode(), _without_data(models, dtype), _collector_off(), watch, kernels:
        images = torch.empty(batch, _CHANNELS, side, side)
        with torch.autocast('cpu', autocast, enabled=autocast is not None):
            logits, theirs = model(images.to(dtype)), None
            if teacher is not None:
                with torch.no_grad():
                    theirs = teacher(images.to(dtype)).float()
        loss = loss_of(logits.float(), theirs)
        del logits, theirs
        watch.turn()
        loss.backward()
    return watch.timeline()


class _Watch(TorchDispatchMode):
    """Counts the storages that operations make, from birth to death."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._sizes: dict[int, int] = {}  # storages that are alive, by address
        self._activations = self._gradients = 0
        self._history: list[tuple[int, int]] = []
        self._forward = 0

    def __enter__(self) -> _Watch:
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._finish)
            for parameter in self._model.parameters()
            if parameter.requires_grad
        ]
        self._weights = {
            t.untyped_storage()._cdata for t in (*self._model.parameters(), *self._model.buffers())
        }
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        self._record()
        return result

    def turn(self) -> None:
        """Marks the end of the forward pass."""
        self._forward = len(self._history)

    def timeline(self) -> Timeline:
        """The bytes after each operation, and after each finished gradient."""
        activations, gradients = np.array(self._history, dtype=np.float64).T
        return Timeline(activations, gradients, self._forward)

    def _record(self) -> None:
        self._history.append((self._activations, self._gradients))

    def _see(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._sizes or address in self._weights:
            return
        self._sizes[address] = storage.nbytes()
        self._activations += storage.nbytes()
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self._activations -= self._sizes.pop(address)

    def _finish(self, parameter: torch.Tensor) -> None:
        """Marks a parameter's gradient as complete: no activation any more."""
        assert parameter.grad is not None
        address = parameter.grad.untyped_storage()._cdata
        size = self._sizes.get(address, 0)
        self._sizes[address] = 0  # gradients stay until the step
        self._activations -= size
        self._gradients += size
        self._record()


@contextmanager
def _without_data(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Gives a model on the meta device tensors "on the CPU", as its forward pass expects them.

    Under FakeTensorMode they take no memory. In the end the model has its own tensors again.
    """
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (store, name, tensor)
        for module in model.modules()
        for store in (module._parameters, module._buffers, vars(module))
        for name, tensor in store.items()
        if isinstance(tensor, torch.Tensor)
    ]
    norms = (module for module in model.modules() if isinstance(module, SyncBatchNorm))
    wide = {id(buffer) for norm in norms for buffer in norm.buffers()}
    # By identity, so that a tied tensor stays tied.
    substitutes = {
        id(tensor): _like(tensor, tensor.dtype if id(tensor) in wide else dtype)
        for *_, tensor in places
    }
    for store, name, tensor in places:
        store[name] = substitutes[id(tensor)]
    try:
        yield
    finally:
        for store, name, tensor in places:
            store[name] = tensor


def _like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    substitute = torch.empty(tensor.shape, dtype=dtype, device='cpu')
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(substitute, requires_grad=tensor.requires_grad)
    return substitute


@contextmanager
def _collector_off() -> Iterator[None]:
    """Turns garbage collection off: a tensor dies when its last reference goes, not later."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
