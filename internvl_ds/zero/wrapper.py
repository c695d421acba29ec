"""The interface to an engine's insides, and its implementation without an optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.errors import ConfigError
from internvl_ds.zero.loss_scale import LossScale
from internvl_ds.zero.module_state import shapes_of_buffers, tied_names
from internvl_ds.zero.parameters import local_values, whole_numel
from internvl_ds.zero.partition import Layout

_CLASS_HAS_IT = object()


class Wrapper:
    """An engine without an optimizer; each kind of optimizer has a class of its own (see `wrap`).

    It does not keep its engine alive.

    Attributes:
        stage: the ZeRO stage.
        partitioned: whether gradients and optimizer state lie in parts on the ranks (stages 1-3).
        sharded: whether the module's parameters do (stage 3).
        scale: the loss scale; None where nothing is scaled.
        ds_config: that the engine runs with, also where it was made from a file's path.
        buffers: name and shape of each buffer of the module's state dict, as the engine was made.
        holds_average: whether averaged weights are where the weights belong.
        in_step, in_backward: whether ``engine.step`` or ``engine.backward`` runs.
        idle: at stages 1 to 3, names of parameters that no update has given a gradient; None where
            it is not known yet.
        before_write: called before a write to what a background save may not have copied yet.
        forget_passes: called where gradients are dropped, see `Agreement`.
        separate_masters: whether the fp32 masters are other tensors than the module's parameters.
    """

    separate_masters = False

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = weakref.ref(engine)
        self.stage = int(engine.zero_optimization_stage())
        self.partitioned, self.sharded = self.stage > 0, self.stage == 3
        self.scale: LossScale | None = None
        self.ds_config: dict[str, Any] = engine._config._param_dict
        self.buffers = shapes_of_buffers(engine.module)
        self.holds_average = False
        self.in_step = self.in_backward = False
        self.idle: set[str] | None = None
        self.before_write: Callable[[], None] = lambda: None
        self.forget_passes: Callable[[], None] = lambda: None

    @property
    def alive(self) -> bool:
        """Whether the engine still exists."""
        return self._engine() is not None

    @property
    def engine(self) -> DeepSpeedEngine:
        """The engine, which must be alive."""
        engine = self._engine()
        assert engine is not None
        return engine

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer, or the client's where there is no other."""
        return self.engine.optimizer

    @property
    def client(self) -> Any:
        """The inner optimizer, of the client or of the ds_config; None if there is none."""
        return self.engine.basic_optimizer

    @property
    def inner(self) -> Any:
        """The optimizer that keeps the state: `client`, or the one inside timm's Lookahead."""
        return getattr(self.client, '_base_optimizer', self.client)

    @property
    def names(self) -> Mapping[torch.Tensor, str]:
        """The name of each parameter of the module, as the engine was made."""
        return self.engine.param_names

    def attach(self) -> None:
        """Gives a new engine one loss scale, moved by `LossScale` only."""
        self.scale = configured_scale(self.engine) if self.client is not None else None
        self.push_scale()

    def masters(self) -> dict[str, torch.Tensor]:
        """The fp32 weights that this rank owns, by parameter name or by group."""
        return {}

    def partitioning(self) -> tuple[Layout, int]:
        """The layout whose groups are `masters` in order, and which of its ranks this one is.

        At stage 0 every rank holds all of them.
        """
        raise NotImplementedError

    def trained_names(self) -> frozenset[str]:
        """The parameters in the optimizer, also those frozen later."""
        return frozenset(self.masters())

    def untrained_names(self) -> list[str]:
        """The parameters that require a gradient but are not in the optimizer.

        They were frozen when the engine was made: DeepSpeed decides then what it trains.
        """
        trained, pairs = self.trained_names(), self.engine.module.named_parameters()
        return [n for n, p in pairs if p.requires_grad and n not in trained and whole_numel(p)]

    def require_own_weights(self, call: str) -> None:
        """Raises while averaged weights are swapped in: a save or update would take them.

        Args:
            call: for the error.

        Raises:
            ConfigError: inside ``ShardedEma.swapped_in``.
        """
        if self.holds_average:
            raise ConfigError(
                f'{call} inside `with model_ema.swapped_in():`: the engine holds the averaged '
                'weights there. Leave the block first; only evaluate in it'
            )

    def push_masters(self) -> None:
        """Sets the module's weights to the fp32 masters. Collective: every rank calls it."""

    def pull_masters(self) -> None:
        """Sets the fp32 masters to the module's weights."""

    def unpadded(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Views of tensors like `masters`, without padding at the end, as DeepSpeed saves them."""
        return tensors

    def release_gathered(self) -> None:
        """Stage 3: frees the whole copies of persistent parameters; only slices are left."""

    def gather_persistent(self) -> None:
        """Stage 3: makes persistent parameters whole again. Collective: every rank calls it."""

    def groups(self) -> list[list[Any]]:
        """The module's parameters of each parameter group."""
        return [group['params'] for group in self.optimizer.param_groups]

    def group_names(self) -> list[list[str]]:
        """The names of a tag's parameter groups; '' for each where the optimizer has none."""
        groups = self.optimizer.param_groups
        return [group.get('param_names') or [''] * len(group['params']) for group in groups]

    def slots(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """The tensors of the client's optimizer in its order, each with the group that it is in."""
        return [(g, tensor) for g in self.client.param_groups for tensor in g['params']]

    def saved_tensors(self, rank: int) -> list[Any]:
        """The tensors that DeepSpeed makes a rank save: a lower estimate.

        Each rank saves the masters and the state that it owns, and rank 0 the module (stages 0 to
        2); at stage 0 it alone saves.
        """
        if rank and not self.partitioned:
            return []
        trees: list[Any] = [] if rank or self.sharded else [self.engine.module.state_dict()]
        if self.client is not None:
            trees.append(list(self.client.state.values()))
            trees.append(self.masters() if self.separate_masters else [])
        return trees

    def steady_tensors(self) -> list[Any]:
        """What an update writes to, or this package, which calls `before_write`; nothing else does.

        A module may write to its buffers and frozen parameters in a forward pass.
        """
        trained = () if self.sharded else self.trained_names()
        weights = [p for p, name in self.names.items() if name in trained]
        optimizers = {self.client, self.inner} - {None}
        return [self.masters(), weights, *(list(o.state.values()) for o in optimizers)]

    def require_unfrozen(self) -> None:
        """Refuses an update where a parameter was frozen that the engine was made to train.

        The client's own optimizer skips it then, as in plain PyTorch. DeepSpeed's optimizers give
        it a gradient of zero, with which momentum and weight decay move it on. The ConfigError
        names the first of them.
        """

    def owned_gradients(self) -> dict[torch.Tensor, torch.Tensor] | None:
        """Parameter -> the part of its gradient that this rank owns, times the loss scale.

        At stage 0 the whole gradient. Parameters without a part here are left out. None when there
        are no gradients, as after a step.
        """
        return {p: p.grad for p in self.engine.module.parameters() if p.grad is not None}

    def begin_backward(self) -> None:
        """Makes the next backward add to earlier gradients, as in plain PyTorch.

        Stage 3 by itself adds only where a forward of the engine came in between.
        """

    def drop_gradients(self) -> None:
        """Drops this rank's gradients since the last update that no ``p.grad`` holds."""

    def complete_gradients(self) -> None:
        """Before a step with offload: hands over gradients that the last micro-batch did not make.

        Those are of parameters without a part in it; zero where they had none in the whole update.
        """

    def clear_gradients(self) -> None:
        """After a step: empties the buffers that the next backward may add to."""

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around the step of DeepSpeed's optimizer: the client's counts each update once."""
        yield

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to give to ``engine.backward``, which does the rest of the scaling."""
        return loss

    def step(self, clip_grad: float) -> torch.Tensor:
        """Takes the engine's step, clipped to a global L2 norm; 0 clips nothing.

        Returns:
            The norm before clipping, unscaled: 0-dim, float32; not finite after a skipped step.
        """
        raise NotImplementedError

    def push_scale(self) -> None:
        """Sets the loss scale in DeepSpeed's fields, which its own rule would have moved."""

    def restore_scale(self, state: Mapping[str, Any] | None) -> None:
        """Takes over a saved loss scale, where the engine has one.

        Args:
            state: of `LossScale` or torch's GradScaler; empty or None: what DeepSpeed's own load
                has put into its fields.
        """
        if self.scale is not None:
            if state:
                self.scale.load_state_dict(state)
            else:
                self.pull_scale(self.scale)
            self.push_scale()

    def pull_scale(self, scale: LossScale) -> None:
        """Reads the loss scale from DeepSpeed's fields after its own load; settings stay."""

    @contextmanager
    def saving(self, defer: Callable[[Callable[[], None]], None]) -> Iterator[None]:
        """Around ``engine.save_checkpoint``: all names of shared parameters, and no needless work.

        DeepSpeed misses further names of what its parent has twice, and reduces the tag's name.

        Args:
            defer: called with the copying of DeepSpeed's recovery scripts, to do it later.
        """
        engine = self.engine
        copy, tied = engine._copy_recovery_script, tied_names(engine.module)
        with (
            replaced(engine, '_copy_recovery_script', lambda at: defer(lambda: copy(at))),
            replaced(engine, '_get_shared_params', lambda: tied),
            replaced(engine, 'checkpoint_tag_validation_enabled', lambda: False),
        ):
            yield

    @contextmanager
    def handing_over_fragments(self) -> Iterator[None]:
        """Around ``engine.save_checkpoint``: it collects views of frozen parameters, not copies.

        DeepSpeed copies all of them to the host, on each rank at stage 2 too.
        """

        def view(parameter: Any) -> torch.Tensor:
            return local_values(parameter).detach()

        with replaced(self.engine, '_get_param_fragment_func', view):
            yield

    @contextmanager
    def loading(self, model_file: str) -> Iterator[None]:
        """Around ``engine.load_checkpoint``: without needless work.

        Args:
            model_file: this rank's model states, where DeepSpeed would take all of such a name.
        """
        self.idle = None
        with replaced(self.engine, '_get_all_ckpt_names', lambda directory, tag: [model_file]):
            yield


@contextmanager
def replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Replaces an attribute or method of one object for the block."""
    before = vars(owner).get(name, _CLASS_HAS_IT)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not _CLASS_HAS_IT:
            setattr(owner, name, before)


@contextmanager
def only_groups(client: Any, groups: list[dict[str, Any]]) -> Iterator[None]:
    """Makes an optimizer step some of its groups only, also inside timm's Lookahead."""
    holders = [client, getattr(client, '_base_optimizer', client)]
    before = [holder.param_groups for holder in holders]
    try:
        for holder in holders:
            holder.param_groups = groups
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.param_groups = own


def configured_scale(engine: DeepSpeedEngine) -> LossScale | None:
    """The loss scale of the ds_config's /fp16 section; also for torch autocast in float16.

    DeepSpeed 0.19.8 keeps the scale in four places, moves it by three rules, and in the middle of a
    step, between the norm and the division by it (stage_1_and_2.py:3047, stage3.py:2892). Here one
    `LossScale` moves after the step, and each `Wrapper` sets it in its place.

    Returns:
        None where nothing is scaled.
    """
    autocast = engine.torch_autocast_enabled()
    if not (engine.fp16_enabled() or (autocast and engine.torch_autocast_dtype() == torch.float16)):
        return None
    settings = engine._config.float16_config
    dynamic = engine.dynamic_loss_scale()
    return LossScale(
        scale=float(engine.initial_dynamic_scale() if dynamic else engine.loss_scale()),
        dynamic=dynamic,
        growth_interval=settings.loss_scale_window,
        hysteresis=settings.hysteresis,
        hysteresis_left=settings.hysteresis,
        consecutive_hysteresis=settings.consecutive_hysteresis,
        min_scale=float(settings.min_loss_scale),
    )
