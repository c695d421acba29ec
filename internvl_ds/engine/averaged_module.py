"""The averaged weights as a module to evaluate, as timm's ``ModelEma.ema`` is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from internvl_ds.errors import ConfigError

if TYPE_CHECKING:
    from internvl_ds.engine.ema import ShardedEma


class AveragedModule:
    """Computes with the average, and leaves the engine as it was after every call.

    A call is a forward pass of the engine in evaluation mode and without gradients. At ZeRO stages
    0 to 2 the first call keeps a copy of the averaged weights in the dtype of the module, which
    stands in for the weights during this call and later ones; the next update of the average
    and the next forward pass with gradients free it. At stage 3 weights and average change places
    around every call: `ShardedEma.swapped_in` does it once for many.

    Attributes:
        training: False.
    """

    training = False

    def __init__(self, average: ShardedEma) -> None:
        self._average = average
        self._copies: dict[str, torch.Tensor] = {}
        self._hook: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The engine's output with the averaged weights. Collective: every rank calls it."""
        engine = self._average.engine
        with torch.no_grad(), _evaluating(engine.module), self._in_place():
            return engine(*args, **kwargs)

    forward = __call__

    def eval(self) -> AveragedModule:
        """Does nothing: it always evaluates."""
        return self

    def train(self, mode: bool = True) -> AveragedModule:
        """Refuses to train.

        Raises:
            ConfigError: for ``mode=True``.
        """
        if mode:
            raise ConfigError(
                'an average does not train: call engine.train(), and leave .ema alone'
            )
        return self

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole average on the CPU, see `ShardedEma`. Collective: every rank calls it."""
        return self._average.state_dict()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f'the module of a ShardedEma has no {name!r}: it is called, and has eval() and '
            'state_dict(). Inside `with model_ema.swapped_in():` the engine itself has the '
            'averaged weights; load_ema_checkpoint loads them'
        )

    def drop_copies(self) -> None:
        """Frees the copy of the averaged weights."""
        self._copies = {}
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _in_place(self) -> AbstractContextManager[None]:
        if self._average.is_swapped_in:
            return nullcontext()
        return self._average.swapped_in() if self._average.is_sharded else self._copies_in_place()

    @contextmanager
    def _copies_in_place(self) -> Iterator[None]:
        if not self._copies:
            self._copy()
        module = self._average.engine.module
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.inference_mode(False):  # what is made in it cannot train afterwards
            weights = {name: tensors[name].data for name in self._copies}
        try:
            _set_data(tensors, self._copies)
            yield
        finally:
            _set_data(tensors, weights)

    def _copy(self) -> None:
        """Copies the averaged tensors. Frozen parameters stay the module's own."""
        engine = self._average.engine
        with torch.inference_mode(False), torch.no_grad(), self._average.swapped_in():
            tensors = self._average.averaged_tensors()
            self._copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._hook = engine.register_forward_pre_hook(self._drop_in_training)

    def _drop_in_training(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.drop_copies()


def _set_data(tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    with torch.inference_mode(False):
        for name, value in values.items():
            tensors[name].data = value
    torch.clear_autocast_cache()  # which knows tensors by identity


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode for the block, then restores each part's mode."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
