"""ZeRO stage 0: the client's own optimizer, or FP16_UnfusedOptimizer around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from internvl_ds.zero.deepspeed_optimizer import DeepSpeedOptimizer
from internvl_ds.zero.partition import Layout, Slices
from internvl_ds.zero.wrapper import Wrapper, replaced


class _Unpartitioned(Wrapper):
    """Every rank holds all of the state, parameter by parameter."""

    def partitioning(self) -> tuple[Layout, int]:
        shapes = {n: tuple(p.shape) for n, p in self.engine.module.named_parameters()}
        return Slices([{name: shapes[name]} for name in self.masters()], 1), 0


class ClientOptimizer(_Unpartitioned):
    """An engine that steps the client's own optimizer: stage 0 in fp32 or torch autocast."""

    def masters(self) -> dict[str, torch.Tensor]:
        ids = {id(p) for group in self.groups() for p in group}
        return {n: p for n, p in self.engine.module.named_parameters() if id(p) in ids}

    def push_scale(self) -> None:
        if self.scale is not None and self._has_scaler:
            # GradScaler.update(scale) wants a backward before. Its growth is off.
            state = {'scale': self.scale.scale, 'growth_factor': 2.0, 'backoff_factor': 0.5}
            state |= {'growth_interval': 2**31 - 1, '_growth_tracker': 0}
            self.engine.torch_autocast_z0_gradscaler.load_state_dict(state)

    def step(self, clip_grad: float) -> torch.Tensor:
        """See `Wrapper`. torch's GradScaler decides whether the optimizer steps.

        In fp32 and bf16 too, where the engine would apply what is not finite; a scale of 1 changes
        no bit of the gradients. The decision is read from the device once, by GradScaler.
        """
        engine, optimizer = self.engine, self.optimizer
        scaler = engine.torch_autocast_z0_gradscaler if self._has_scaler else None
        if scaler is None:
            scale = 1.0 if self.scale is None else self.scale.scale
            scaler = torch.amp.GradScaler(engine.device.type, init_scale=scale)
            scaler.scale(torch.zeros((), device=engine.device))  # makes its scale tensor
        params = [p for group in self.groups() for p in group if p.grad is not None]
        hook = optimizer.register_step_post_hook(_note_step)
        try:
            with (
                self._stepped_by(scaler),
                replaced(engine._config, 'gradient_clipping', 0.0),
                # A fused optimizer would be called for every step and decide on the device, where
                # nobody sees whether it stepped; the scheduler and the count of skipped steps need
                # that.
                replaced(optimizer, '_step_supports_amp_scaling', False),
                replaced(optimizer, 'overflow', True),  # by this the engine counts it as skipped
            ):
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.get_total_norm([p.grad for p in params]).to(torch.float32)
                if clip_grad > 0:
                    torch.nn.utils.clip_grads_with_norm_(params, clip_grad, norm)
                engine.step()
        finally:
            hook.remove()
        return norm

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """See `Wrapper`. Before DeepSpeed 0.18 an engine scales nothing under torch autocast."""
        if self.scale is None or self._has_scaler:
            return loss
        return loss.float() * self.scale.scale

    @property
    def _has_scaler(self) -> bool:
        """Whether the engine steps through torch's GradScaler; not before DeepSpeed 0.18."""
        return hasattr(self.engine, 'torch_autocast_z0_gradscaler')

    def _stepped_by(self, scaler: torch.amp.GradScaler) -> AbstractContextManager[None]:
        if self._has_scaler:
            return replaced(self.engine, 'torch_autocast_z0_gradscaler', scaler)
        optimizer, step = self.optimizer, self.optimizer.step

        def step_if_finite() -> None:
            with replaced(optimizer, 'step', step):
                scaler.step(optimizer)

        return replaced(optimizer, 'step', step_if_finite)


def _note_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    optimizer.overflow = False


class UnfusedOptimizer(_Unpartitioned, DeepSpeedOptimizer):
    """An engine in fp16 or bf16 at stage 0."""

    def attach(self) -> None:
        """Undoes the step on zero gradients by which DeepSpeed initializes the optimizer's state.

        AdamW counts that step and applies its weight decay, so the first real step would differ
        from plain PyTorch's (seen in DeepSpeed 0.19.8,
        FP16_UnfusedOptimizer.initialize_optimizer_states). The masters were copied from the
        low-precision weights and are copied from them again.
        """
        if self.engine.global_steps == 0:
            self.pull_masters()
            self.client.state.clear()
        names = self._names()
        for group, lows in zip(self.client.param_groups, self.groups(), strict=True):
            if 'param_names' in group:  # DeepSpeed has dropped what is frozen from the group
                group['param_names'] = [names[id(low)] for low in lows]
        super().attach()
        if self.scale is None:  # before 0.18 DeepSpeed scales in bf16 too
            self._holder.dynamic_loss_scale, self._holder.cur_scale = False, 1.0

    def masters(self) -> dict[str, torch.Tensor]:
        names = self._names()
        return {names[id(low)]: master for low, master in self._pairs()}

    def push_masters(self) -> None:
        for low, master in self._pairs():
            low.data.copy_(master.data)

    def groups(self) -> list[list[Any]]:
        return self.optimizer.fp16_groups

    def clear_gradients(self) -> None:
        for parameter in (low for lows in self.groups() for low in lows):
            parameter.grad = None  # before 0.18 DeepSpeed keeps it in bf16

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """See `Wrapper`. ``engine.backward`` scales for ZeRO optimizers only.

        So it does in DeepSpeed 0.19.8 (engine.py:3417), while the step divides by the scale. Before
        0.18 it scales here too.
        """
        scale = self._holder.cur_scale
        return loss if scale == 1.0 or self._holder is self.optimizer else loss.float() * scale

    @contextmanager
    def saving(self, defer: Callable[[Callable[[], None]], None]) -> Iterator[None]:
        with super().saving(defer), self._in_the_models_file():
            yield

    @contextmanager
    def loading(self, model_file: str) -> Iterator[None]:
        with super().loading(model_file), self._in_the_models_file():
            yield

    def _in_the_models_file(self) -> AbstractContextManager[None]:
        """Before 0.18 DeepSpeed leaves the state of bf16 to an optimizer of ZeRO, here too."""
        return replaced(self.engine, 'bfloat16_enabled', lambda: False)

    @property
    def _holder(self) -> Any:
        return getattr(self.optimizer, 'loss_scale_config', self.optimizer)  # it, before 0.18

    def _reported_norm(self) -> Any:
        """Without the loss scale, which is in the norm that DeepSpeed reports."""
        return super()._reported_norm() / (1.0 if self.scale is None else self.scale.scale)

    def _names(self) -> dict[int, str]:
        return {id(p): n for n, p in self.engine.module.named_parameters()}

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each parameter that is trained, and its fp32 master."""
        for lows, masters in zip(self.groups(), self.optimizer.fp32_groups, strict=True):
            yield from zip(lows, masters, strict=True)
