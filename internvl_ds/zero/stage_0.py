"""ZeRO stage 0: the client's own optimizer, or FP16_UnfusedOptimizer around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch

from internvl_ds.errors import ConfigError, few
from internvl_ds.zero.deepspeed_optimizer import DeepSpeedOptimizer
from internvl_ds.zero.partition import Layout, Slices
from internvl_ds.zero.wrapper import Wrapper, configured_scale, replaced


class ModuleBefore018(Wrapper):
    """An engine without an optimizer, before DeepSpeed 0.18."""

    def attach(self) -> None:
        super().attach()
        if self.optimizer is not None:  # of nothing, in bf16, and its own looks for groups
            self.optimizer.destroy = lambda: None


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
        if self.scale is not None:
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
        scaler = engine.torch_autocast_z0_gradscaler
        if scaler is None:
            scaler = torch.amp.GradScaler(engine.device.type, init_scale=1.0)
            scaler.scale(torch.zeros((), device=engine.device))  # makes its scale tensor
        params = [p for group in self.groups() for p in group if p.grad is not None]
        hook = optimizer.register_step_post_hook(_note_step)
        try:
            with (
                replaced(engine, 'torch_autocast_z0_gradscaler', scaler),
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


class ClientOptimizerBefore018(ClientOptimizer):
    """The same before DeepSpeed 0.18, whose engine has no GradScaler."""

    def attach(self) -> None:
        engine, optimizer, device = self.engine, self.optimizer, self.engine.device.type
        scales = configured_scale(engine) is not None
        engine.torch_autocast_z0_gradscaler = torch.amp.GradScaler(device) if scales else None
        optimizer.step = functools.partial(self._step, optimizer.step)
        if scales:
            engine._do_optimizer_backward = self._backward
            engine.clip_fp32_gradients = self._clip
        super().attach()

    def _backward(self, loss: torch.Tensor, retain_graph: bool) -> None:
        engine = self.engine
        scaled = engine.torch_autocast_z0_gradscaler.scale(loss)
        type(engine)._do_optimizer_backward(engine, scaled, retain_graph)

    def _clip(self) -> None:
        self.engine.torch_autocast_z0_gradscaler.unscale_(self.optimizer)
        type(self.engine).clip_fp32_gradients(self.engine)

    def _step(self, step: Callable[[], None]) -> None:
        scaler = self.engine.torch_autocast_z0_gradscaler if self.in_step else None
        if scaler is None:
            step()
            return
        with replaced(self.optimizer, 'step', step):
            scaler.step(self.optimizer)
        scaler.update()


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
        frozen = [p for lows in self.groups() for p in lows if not p.requires_grad]
        if frozen and self.engine.global_steps == 0:
            raise ConfigError(  # 0.19.8 leaves them out by itself
                f'{len(frozen)} frozen parameters are in the optimizer, and DeepSpeed '
                f'{deepspeed.__version__} lets weight decay move them in half precision at ZeRO '
                f'stage 0: {few([self.names[p] for p in frozen])}. Make the optimizer over those '
                'that are trained, use stage 1, or install deepspeed>=0.19.8'
            )
        if self.engine.global_steps == 0:
            self.pull_masters()
            self.client.state.clear()
        names = self._names()
        for group, lows in zip(self.client.param_groups, self.groups(), strict=True):
            if 'param_names' in group:  # DeepSpeed has dropped what is frozen from the group
                group['param_names'] = [names[id(low)] for low in lows]
        super().attach()

    def masters(self) -> dict[str, torch.Tensor]:
        names = self._names()
        return {names[id(low)]: master for low, master in self._pairs()}

    def push_masters(self) -> None:
        for low, master in self._pairs():
            low.data.copy_(master.data)

    def groups(self) -> list[list[Any]]:
        return self.optimizer.fp16_groups

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """See `Wrapper`. ``engine.backward`` scales for ZeRO optimizers only.

        So it does in DeepSpeed 0.19.8 (engine.py:3417), while the step divides by the scale.
        """
        return loss if self._holder.cur_scale == 1.0 else loss.float() * self._holder.cur_scale

    @property
    def _holder(self) -> Any:
        return self.optimizer.loss_scale_config

    def _reported_norm(self) -> Any:
        """Without the loss scale, which is in the norm that DeepSpeed reports."""
        return super()._reported_norm() / (1.0 if self.scale is None else self.scale.scale)

    def _names(self) -> dict[int, str]:
        return {id(p): n for n, p in self.engine.module.named_parameters()}

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each parameter that is trained, and its fp32 master."""
        for lows, masters in zip(self.groups(), self.optimizer.fp32_groups, strict=True):
            yield from zip(lows, masters, strict=True)


class UnfusedOptimizerBefore018(UnfusedOptimizer):
    """The same before DeepSpeed 0.18, whose optimizer holds the scale and scales by itself.

    In bf16 it does so too, keeps gradients after a step, and is left out of tags.
    """

    def attach(self) -> None:
        super().attach()
        if self.scale is None:
            self._holder.dynamic_loss_scale, self._holder.cur_scale = False, 1.0

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad()

    @contextmanager
    def saving(self, defer: Callable[[Callable[[], None]], None]) -> Iterator[None]:
        with super().saving(defer), replaced(self.engine, 'bfloat16_enabled', lambda: False):
            yield

    @contextmanager
    def loading(self, model_file: str) -> Iterator[None]:
        with super().loading(model_file), replaced(self.engine, 'bfloat16_enabled', lambda: False):
            yield

    @property
    def _holder(self) -> Any:
        return self.optimizer
