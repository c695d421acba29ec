"""The micro-batches since an engine's last update, and the zero_grad that drops them."""

from __future__ import annotations

import types
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.ops.adam import FusedAdam
from torch import nn

from internvl_ds.errors import ConfigError
from internvl_ds.zero.wrapper import Wrapper


@dataclass
class Accumulation:
    """The micro-batches since an engine's last update.

    Attributes:
        losses: of the micro-batches whose gradients are kept; 0-dim, this rank's, divided by the
            caller, not read.
        dropped: whether micro-batches were dropped since the last update.
        last_group: micro-batches of the last update; None when it is not known.
        micro_batches: how many have come in all, those of skipped updates and dropped ones too.
        warned: whether a save has said that it does not keep them.
    """

    losses: list[torch.Tensor] = field(default_factory=list)
    dropped: bool = False
    last_group: int | None = None
    micro_batches: int = 0
    warned: bool = False

    def add(self, loss: torch.Tensor) -> None:
        """Counts a micro-batch whose backward begins."""
        self.losses.append(loss.detach())
        self.micro_batches += 1

    def drop(self) -> None:
        """Forgets the micro-batches since the last update."""
        self.losses, self.dropped = [], True

    def finish(self, agreed: int) -> list[torch.Tensor]:
        """Ends the update and returns its losses; ``agreed``: gradient_accumulation_steps."""
        losses, self.losses = self.losses, []
        # What was dropped says nothing of the loop's setting.
        self.last_group = agreed if self.dropped else len(losses)
        self.dropped = False
        return losses

    def require_agreed(self, agreed: int, updates: int) -> None:
        """Refuses a boundary at the next micro-batch that does not agree with the setting.

        Args:
            agreed: gradient_accumulation_steps.
            updates: how many there have been.

        Raises ConfigError before anything is done.
        """
        count, last = len(self.losses) + 1, self.last_group
        if updates and (last is None or last > agreed):
            last = agreed  # a resumed run of which no more is known, or had another setting
        # The last group of an epoch may be short, and then the one before it was full.
        short = count < agreed and last != agreed and not self.dropped
        if count > agreed or short:
            raise ConfigError(
                f'this update has {count} micro-batches (calls up to one with update_grad=True), '
                f'and the one before it {last}, but gradient_accumulation_steps of the ds_config '
                f'(TRAIN.ACCUMULATION_STEPS) is {agreed}, by which the loss is to be divided. Make '
                "the loop and the setting agree; only an epoch's last update may have fewer. What "
                'an epoch leaves over goes with optimizer.zero_grad() at the beginning of the next.'
            )


def watch_zero_grad(wrapper: Wrapper, accumulation: Accumulation) -> None:
    """Makes any zero_grad of an engine drop ZeRO's gradients, and reset their count.

    That of the engine, of its module, of DeepSpeed's optimizer and of the client's own. By itself
    only DeepSpeed's does, at stage 3 only.
    """
    engine = wrapper.engine
    for part in {engine, engine.module, wrapper.optimizer, wrapper.client}:
        part.zero_grad = _ZeroGrad(part, wrapper, accumulation)


class _ZeroGrad:
    """Replaces the ``zero_grad`` of a part of an engine. Holds no strong reference."""

    def __init__(self, part: Any, wrapper: Wrapper, accumulation: Accumulation) -> None:
        self._part, self._wrapper = weakref.ref(part), wrapper
        self._accumulation = accumulation

    def __call__(self, set_to_none: bool = True) -> None:
        part, wrapper = self._part(), self._wrapper
        if part is None:
            return
        if wrapper.alive and part is wrapper.client:
            part = wrapper.optimizer  # the client's own has no gradients but its partition's
        is_engine = wrapper.alive and part is wrapper.engine
        base = nn.Module if is_engine else type(part)
        if isinstance(part, FusedAdam):  # whose own takes no argument
            base = torch.optim.Optimizer
        base.zero_grad(part, set_to_none=set_to_none)
        by_deepspeed = wrapper.in_step or wrapper.in_backward  # in backward before 0.18
        if wrapper.alive and self._accumulation.losses and not by_deepspeed:
            self._accumulation.drop()
            wrapper.drop_gradients()
            wrapper.forget_passes()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module belongs to no engine: it gets its own zero_grad."""
        copy = memo[id(self._part())]
        return types.MethodType(type(copy).zero_grad, copy)
