"""The wrapper base of DeepSpeed's optimizers, and the one of ZeRO stages 1 to 3.

DeepSpeed 0.19.8 leaves old gradients in its buffers for the next backward to overwrite. So where a
parameter takes no part in the next update, its last gradient is applied again (at stage 3, and with
offload at any); and with offload a parameter without a part in an update's last micro-batch gets
nothing applied.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from deepspeed.runtime import utils as deepspeed_utils
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

from internvl_ds.errors import ConfigError, few
from internvl_ds.zero.loss_scale import LossScale
from internvl_ds.zero.muon.routing import is_muon
from internvl_ds.zero.muon.step import MuonParts
from internvl_ds.zero.wrapper import Wrapper, configured_scale, only_groups, replaced


class DeepSpeedOptimizer(Wrapper):
    """An engine whose optimizer is one of DeepSpeed's, around the client's."""

    separate_masters = True

    def require_unfrozen(self) -> None:
        frozen = [p for group in self.groups() for p in group if not p.requires_grad]
        if frozen:
            raise ConfigError(
                f'{len(frozen)} parameters were frozen after the engine was made to train them: '
                f'{few([self.names[p] for p in frozen])}. Momentum and weight decay would go '
                f'on moving them ({type(self.optimizer).__name__} gives them a gradient of zero). '
                'Freeze before initialize: save, and make the engine anew over the rest from the '
                'weights of the tag (MODEL.PRETRAINED); only ZeRO stage 0 in fp32 or torch '
                'autocast can go on'
            )

    def pull_masters(self) -> None:
        self.optimizer.refresh_fp32_params()

    def step(self, clip_grad: float) -> torch.Tensor:
        engine = self.engine
        self.optimizer.clip_grad = clip_grad
        # It must not move the scale while the step still divides by it.
        with replaced(self.optimizer, '_update_scale', lambda has_overflow=False: None):
            engine.step()
        norm = self._reported_norm() if engine.was_step_applied() else math.inf
        if not isinstance(norm, torch.Tensor):  # filled in: a copy would wait for the device
            norm = torch.full((), norm, device=engine.device)
        return norm.to(engine.device, torch.float32)

    def push_scale(self) -> None:
        scale = self.scale
        if scale is None:
            return
        holder = self._holder
        holder.cur_scale = scale.scale
        if scale.dynamic:
            # DeepSpeed grows when cur_iter - last_overflow_iter - 1 is a multiple of its window.
            holder.cur_iter = self.engine.global_steps
            holder.last_overflow_iter = holder.cur_iter - scale.growth_tracker - 2

    def pull_scale(self, scale: LossScale) -> None:
        if scale.dynamic:
            holder = self._holder
            successes = holder.cur_iter - (holder.last_overflow_iter or -1) - 2
            tracker = max(0, successes) % scale.growth_interval
            state = {'scale': holder.cur_scale, '_growth_tracker': tracker}
            scale.load_state_dict({**state, 'hysteresis_left': self._hysteresis_left()})

    @property
    def _holder(self) -> Any:
        """The object that holds DeepSpeed's loss scale."""
        raise NotImplementedError

    def _hysteresis_left(self) -> int:
        return 1

    def _reported_norm(self) -> Any:
        return self.engine.get_global_grad_norm()


class ZeroOptimizer(DeepSpeedOptimizer):
    """An engine at ZeRO stage 1, 2 or 3.

    Attributes:
        OFFLOADED_IDS: DeepSpeed's name for the parameters whose gradients it has accumulated in
            host memory.
        HAND_OVER: its name for what hands their gradients to the optimizer.
    """

    OFFLOADED_IDS: ClassVar[str]
    HAND_OVER: ClassVar[str]
    _muon: MuonParts | None = None
    _shapes: list[dict[str, torch.Size]] | None = None

    def attach(self) -> None:
        # Under torch autocast in float16 DeepSpeed makes a GradScaler here, whose factor its norm
        # and its clipping do not know; and it makes one for every later engine of the process too,
        # whatever that trains in. A loss_scaler is what they know.
        self.optimizer.torch_autocast_gradscaler = None
        if is_muon(self.client):
            self._muon = MuonParts(
                self.client, self.slots(), *self.partitioning(), self.engine.device
            )
        if not hasattr(deepspeed_utils, 'is_invalid_grad_norm'):
            self.check_all_gradients()
        self.scale = configured_scale(self.engine)
        if self.scale is not None:
            self.optimizer.dynamic_loss_scale = self.scale.dynamic
            self._renew_loss_scaler(self.scale)
        self.push_scale()

    def check_all_gradients(self) -> None:
        """Makes DeepSpeed skip updates that are not finite; before 0.19 it does so in fp16 only.

        Of others it makes a norm of 1, and applies them.
        """
        self.optimizer.check_grad_overflow = True

    def flat_masters(self) -> Sequence[torch.Tensor]:
        """The flat fp32 tensors that this rank owns, one for each of `shapes`."""
        raise NotImplementedError

    def shapes(self) -> list[dict[str, torch.Size]]:
        """Name -> shape of the parameters that lie in each of `flat_masters`."""
        if self._shapes is None:  # they stay, and a save asks five times
            self._shapes = self.engine._get_zero_param_shapes()
        return self._shapes

    def masters(self) -> dict[str, torch.Tensor]:
        return {f'{i:04d}': flat for i, flat in enumerate(self.flat_masters())}

    def trained_names(self) -> frozenset[str]:
        return frozenset(name for group in self.shapes() for name in group)

    def group_names(self) -> list[list[str]]:
        return [list(group) for group in self.shapes()]

    def begin_backward(self) -> None:
        if hasattr(self.optimizer, 'clear_backward_seen_flag'):
            self.optimizer.clear_backward_seen_flag()

    def drop_gradients(self) -> None:
        type(self.optimizer).zero_grad(self.optimizer)
        self.clear_gradients()

    def complete_gradients(self) -> None:
        if not self._offloads:
            return
        optimizer, norms = self.optimizer, self.optimizer.norm_for_param_grads
        ids = getattr(optimizer, self.OFFLOADED_IDS)
        if rest := ids - norms.keys():
            setattr(optimizer, self.OFFLOADED_IDS, rest)
            getattr(optimizer, self.HAND_OVER)()
            setattr(optimizer, self.OFFLOADED_IDS, ids)
        for part in self._idle_parts(norms):
            part.zero_()

    def push_scale(self) -> None:
        super().push_scale()
        if self.scale is not None and self.scale.dynamic:
            self._holder.cur_hysteresis = self.scale.hysteresis_left

    def pull_scale(self, scale: LossScale) -> None:
        super().pull_scale(scale)
        self._renew_loss_scaler(scale)

    @contextmanager
    def saving(self, defer: Callable[[Callable[[], None]], None]) -> Iterator[None]:
        with super().saving(defer), self._frozen_as_made():
            yield

    @contextmanager
    def loading(self, model_file: str) -> Iterator[None]:
        with super().loading(model_file), self._frozen_as_made():
            yield

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """See `Wrapper`. DeepSpeed calls ``step()`` for each group, and at stage 3 for each part.

        The optimizer then sees no other group: what counts updates in its groups (Adan) or for all
        of them (Lookahead) would count calls. Between the parts of a group its numbers go back.
        A Muon's matrices are stepped here, and its own step then has the other groups, or none.
        """
        client, step = self.client, self.client.step
        left = Counter(id(group) for group, _ in self.slots())

        def step_parts(*args: Any, **kwargs: Any) -> Any:
            groups = [group for group in client.param_groups if group['params']]
            before = [_numbers_of(g) if left[id(g)] > 1 else {} for g in groups]
            rest = groups if self._muon is None else self._muon.step(client, groups)
            with only_groups(client, rest):
                result = step(*args, **kwargs)
            for group, numbers in zip(groups, before, strict=True):
                group.update(numbers)
                left[id(group)] -= 1
            return result

        with replaced(client, 'step', step_parts):
            yield

    @property
    def _offloads(self) -> bool:
        raise NotImplementedError

    def _idle_parts(self, norms: Container[Any]) -> Iterator[torch.Tensor]:
        """The gradients that the offloaded optimizer will read, of parameters of other ids."""
        raise NotImplementedError

    @property
    def _holder(self) -> Any:
        return self.optimizer.loss_scaler

    def _hysteresis_left(self) -> int:
        return self._holder.cur_hysteresis

    def _renew_loss_scaler(self, scale: LossScale) -> None:
        self.optimizer.loss_scaler = CreateLossScaler(
            torch.float16, scale.scale, scale.dynamic, self.engine.dynamic_loss_scale_args()
        )

    @contextmanager
    def _frozen_as_made(self) -> Iterator[None]:
        """Restores meanwhile the ``requires_grad`` with which the engine was made.

        DeepSpeed takes it to say what the optimizer has. Where a script has frozen or unfrozen a
        parameter since, a save at stage 3 would write it twice or not at all, and a load at stages
        2 and 3 would look for what is not there.
        """
        trained = self.trained_names()
        parameters = [p for p, name in self.names.items() if p.requires_grad != (name in trained)]
        for parameter in parameters:
            parameter.requires_grad_(not parameter.requires_grad)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(not parameter.requires_grad)


def _numbers_of(group: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group, counters included."""
    numbers = {k: v for k, v in group.items() if isinstance(v, int | float | torch.Tensor)}
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in numbers.items()}
