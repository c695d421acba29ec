"""What one training step holds beside the weights, watched on tensors that hold nothing.

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
from internvl_ds.train.models.batch_norm import SyncBatchNorm

_CHANNELS = 3
_BATCHES = 2, 4  # that are watched; mixup needs even ones

_ENGINE_DTYPES = {ds.BF16: torch.bfloat16, ds.FP16: torch.float16}
_AUTOCAST_DTYPES = {ds.AUTOCAST_BF16: torch.bfloat16, ds.AUTOCAST_FP16: torch.float16}

Loss = Callable[[torch.Tensor], torch.Tensor]


def engine_dtype(precision: str) -> torch.dtype:
    """The dtype of an engine's weights and inputs; float32 under torch autocast too.

    Args:
        precision: one of the constants of `ds_config`.
    """
    return _ENGINE_DTYPES.get(precision, torch.float32)


@dataclass(frozen=True)
class Timeline:
    """Bytes that are alive after each operation of a step, weights and buffers left out.

    Attributes:
        activations: all but finished gradients; float64, one entry an operation.
        gradients: of the parameters whose gradient is finished; the same length.
        forward: how many of the operations are the forward pass, the loss included.
    """

    activations: np.ndarray
    gradients: np.ndarray
    forward: int

    @property
    def saved(self) -> int:
        """What the forward pass leaves for the backward pass, bytes; the loss with it."""
        return int(self.activations[self.forward - 1])


@dataclass(frozen=True)
class Step:
    """A training step of any batch, told from steps of two batches that were watched.

    Operation by operation, what is alive is a constant and a part that grows with the batch.

    Attributes:
        small: the step of the smaller batch.
        large: the step of the larger one.
        batches: images of the two.
    """

    small: Timeline
    large: Timeline
    batches: tuple[int, int]

    def at(self, batch: int) -> Timeline:
        """The step of a micro-batch of ``batch`` images."""
        small, large = self.batches
        per_image = (self.large.activations - self.small.activations) / (large - small)
        activations = self.small.activations + per_image * (batch - small)
        return Timeline(np.maximum(activations, 0.0), self.small.gradients, self.small.forward)

    def activations(self, batch: int) -> int:
        """The most that activations take in the step of ``batch`` images, bytes."""
        return int(self.at(batch).activations.max())


def watch_step(model: nn.Module, image_size: int, precision: str, loss_of: Loss) -> Step:
    """Watches a training step, without data and without memory for it.

    Args:
        model: on the meta device, and in the training mode that the run has it in; left as it was.
        image_size: pixels, of square images.
        precision: one of the constants of `ds_config`.
        loss_of: logits in float32 -> the loss, 0-dim.

    Raises:
        ConfigError: for a model that cannot run without data.
    """
    try:
        steps = [_watch(model, n, image_size, precision, loss_of) for n in _BATCHES]
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


def _watch(model: nn.Module, batch: int, side: int, precision: str, loss_of: Loss) -> Timeline:
    dtype, autocast = engine_dtype(precision), _AUTOCAST_DTYPES.get(precision)
    with FakeTensorMode(), _without_data(model, dtype), _collector_off(), _Watch(model) as watch:
        images = torch.empty(batch, _CHANNELS, side, side)
        with torch.autocast('cpu', autocast) if autocast else nullcontext():
            logits = model(images.to(dtype))
        loss = loss_of(logits.float())
        del logits
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
        self._hooks: list[Any] = []

    def __enter__(self) -> _Watch:
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._finish)
                self._hooks.append(hook)
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
        """The forward pass is over."""
        self._forward = len(self._history)

    def timeline(self) -> Timeline:
        """What was alive after each operation, and each time that a gradient was finished."""
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
        """A parameter's gradient is complete: it is no activation any more."""
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

    Under FakeTensorMode they take no memory. The model has its own back in the end.
    """
    made: dict[int, torch.Tensor] = {}  # a tied tensor stays tied
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = module._parameters, module._buffers, vars(module)
        for store in stores:
            for name, tensor in store.items():
                if isinstance(tensor, torch.Tensor):
                    places.append((store, name, tensor))
    wide = {id(b) for m in model.modules() if isinstance(m, SyncBatchNorm) for b in m.buffers()}
    for store, name, tensor in places:
        if id(tensor) not in made:
            made[id(tensor)] = _like(tensor, tensor.dtype if id(tensor) in wide else dtype)
        store[name] = made[id(tensor)]
    try:
        yield
    finally:
        for store, name, tensor in places:
            store[name] = tensor


def _like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    kept = dtype if tensor.is_floating_point() else tensor.dtype
    made = torch.empty(tensor.shape, dtype=kept, device='cpu')
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


@contextmanager
def _collector_off() -> Iterator[None]:
    """Lets tensors die when their last reference goes, not whenever a collection comes by."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
