"""An exponential moving average of the weights that shards with the model.

Each rank averages the fp32 masters that it owns (all of them at stage 0), so an update is local
memory traffic only. To evaluate, average and masters change places and the masters are pushed to
the module, as DeepSpeed does after a step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.averaged_module import AveragedModule
from internvl_ds.engine.registry import engine_of, wrapper_of
from internvl_ds.errors import CheckpointMismatch, ConfigError, few
from internvl_ds.files.ema_shard import EmaFile, shard_name
from internvl_ds.zero.lazy_tensor import Flat, fill
from internvl_ds.zero.parameters import is_sharded
from internvl_ds.zero.partition import owned, shapes_of


@dataclass(frozen=True)
class EmaWarmup:
    """Ramps the decay up from 0, so that the average soon forgets the first weights; as timm.

    The decay of update n (the first is 1) is ``1 - (1 + (n - 1) / gamma) ** -power``, and 0 for the
    first, within ``min_decay`` and the average's own decay (timm.utils.ModelEmaV3.get_decay).
    """

    gamma: float = 1.0
    power: float = 2 / 3
    min_decay: float = 0.0

    def decay(self, update: int, most: float) -> float:
        """The decay of an update, by its number from 1; ``most`` is what it rises to."""
        if update <= 1:
            return 0.0
        decay = 1 - (1 + (update - 1) / self.gamma) ** -self.power
        return max(min(decay, most), self.min_decay)


class ShardedEma:
    """The average of a training engine's weights: ``ema = decay * ema + (1 - decay) * weights``.

    It is kept in float32. Buffers are averaged where they are floating point and copied where not,
    as timm's ModelEmaV3 does; frozen parameters are not kept.

    Attributes:
        decay: the share of the old average that stays in an update.
        warmup: how the decay rises to that; None where it is the same from the start.
        num_updates: how many updates have been made.
        ema: the average as a module to evaluate: ``validate(config, loader, model_ema.ema)``.
        is_swapped_in: whether the engine computes with the average, inside `swapped_in`.
    """

    def __init__(
        self, model: Any, decay: float = 0.9998, warmup: EmaWarmup | bool | None = None
    ) -> None:
        """Starts the average at the engine's present weights.

        Args:
            model: an engine, or a module or optimizer that belongs to one.
            decay: in [0, 1].
            warmup: True for timm's defaults.
        """
        self.engine: DeepSpeedEngine = engine_of(model)
        self._wrapper = wrapper_of(self.engine)
        self.decay = decay
        self.warmup = EmaWarmup() if warmup is True else warmup or None
        self.num_updates = 0
        self._shards = {name: t.detach().clone() for name, t in self._wrapper.masters().items()}
        self._buffers = {n: _copy_to_average(b) for n, b in self.engine.module.named_buffers()}
        self.is_swapped_in = False
        self.ema = AveragedModule(self)

    @property
    def is_sharded(self) -> bool:
        """Whether the module's parameters are cut up (ZeRO stage 3)."""
        return self._wrapper.sharded

    def averaged_tensors(self) -> dict[str, torch.Tensor]:
        """The parameters and buffers of the module that have an average, by name."""
        module, names = self.engine.module, self._wrapper.trained_names()
        parameters = {n: p for n, p in module.named_parameters() if n in names}
        return {**parameters, **dict(module.named_buffers())}

    def averages(self) -> list[torch.Tensor]:
        """The averages of the parameters, which change after `Wrapper.before_write`."""
        return list(self._shards.values())

    def buffers(self) -> dict[str, torch.Tensor]:
        """The averages of the module's buffers, by name, which may be written to."""
        self.ema.drop_copies()
        return self._buffers

    @torch.no_grad()
    def update(self, model: Any = None) -> None:
        """Takes the weights after a step into the average; a skipped step changes nothing.

        Call it on every rank after each boundary. It talks to no other rank.

        Args:
            model: accepted for timm's ``update(model)``: the engine of this average, or its module.

        Raises:
            ConfigError: for another model, and inside `swapped_in`.
        """
        if model is not None and engine_of(model) is not self.engine:
            raise ConfigError('ShardedEma.update: this model belongs to another engine')
        self._require_own_weights('ShardedEma.update')
        if not self.engine.was_step_applied():
            return
        self.ema.drop_copies()
        self._wrapper.before_write()
        self.num_updates += 1
        decay = self.warmup.decay(self.num_updates, self.decay) if self.warmup else self.decay
        averages, weights = list(self._shards.values()), list(self._wrapper.masters().values())
        for name, buffer in self.engine.module.named_buffers():
            average = self._buffers[name]
            if average.is_floating_point():
                averages.append(average)
                weights.append(buffer.to(average.dtype))
            else:
                average.copy_(buffer)
        torch._foreach_lerp_(averages, weights, 1.0 - decay)

    @contextmanager
    def swapped_in(self, engine: DeepSpeedEngine | None = None) -> Iterator[None]:
        """Swaps the averaged weights into the engine; the trained ones come back at the end.

        Collective: every rank enters and leaves it. The weights come back bit for bit, also after
        an exception. No step and no save may be made inside; entered again, it does nothing.

        Args:
            engine: accepted for symmetry; the engine of this average is used.
        """
        if self.is_swapped_in:
            yield
            return
        buffers = dict(self.engine.module.named_buffers())
        copies = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        self._exchange_masters()
        self._set_buffers(self._buffers)
        outer = self._wrapper.holds_average  # another average may be swapped in
        self._note_swap(True, True)
        try:
            yield
        finally:
            self._exchange_masters()
            self._set_buffers(copies)
            self._note_swap(False, outer)

    def whole_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Key of the module's state dict, and averaged tensor, gathered one at a time.

        Collective: every rank takes all of them. Frozen parameters are the module's own. No rank
        holds more than the tensor that it is at, which is on the engine's device.
        """
        self._require_own_weights('ShardedEma.state_dict')
        layout, own_rank = self._wrapper.partitioning()
        shapes, shards = shapes_of(layout), list(self._shards.values())
        names = self._wrapper.names
        for key, target in self.engine.module.state_dict(keep_vars=True).items():
            name = names.get(target, key) if isinstance(target, torch.nn.Parameter) else key
            if key in self._buffers:
                yield key, self._buffers[key]
            elif name in shapes:
                flat = torch.empty(math.prod(shapes[name]), device=self.engine.device)
                for place in layout.places(name):
                    piece = flat[place.start : place.stop]
                    if place.rank == own_rank:
                        end = place.offset + piece.numel()
                        piece.copy_(shards[place.group].view(-1)[place.offset : end])
                    if layout.ranks > 1:
                        dist.broadcast(piece, place.rank)
                yield key, flat.view(shapes[name])
            elif isinstance(target, torch.Tensor):
                with deepspeed.zero.GatheredParameters([target], enabled=is_sharded(target)):
                    yield key, target.detach().clone()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole average on the CPU, by the keys of the module's state dict.

        Collective: every rank calls it. Each gets all of it; `whole_tensors` is for where that is
        too much.
        """
        return {name: tensor.detach().cpu().clone() for name, tensor in self.whole_tensors()}

    def shard_file(self) -> EmaFile:
        """This rank's part, as it goes into a tag: views of the average, not copies."""
        tensors = {f'shard/{n}': t for n, t in self._unpadded(self._shards).items()}
        if rank() == 0:
            tensors.update({f'buffer/{n}': t for n, t in self._buffers.items()})
        metadata = {
            'decay': repr(float(self.decay)),
            'num_updates': str(self.num_updates),
            'warmup': json.dumps(asdict(self.warmup) if self.warmup else None),
            'zero_stage': str(self._wrapper.stage),
            'world_size': str(world_size()),
        }
        return EmaFile(shard_name(rank()), tensors, metadata)

    @torch.no_grad()
    def load_shard(self, saved: Any) -> None:
        """Reads this rank's part back from ``saved``, a tag's `EmaFiles`.

        Raises CheckpointMismatch when the tag is of another world size, ZeRO stage or model.
        """
        self._require_own_weights('load_ema_checkpoint')
        stage, ranks = self._wrapper.stage, world_size()
        header = saved.header
        if (int(header['zero_stage']), int(header['world_size'])) != (stage, ranks):
            raise CheckpointMismatch(
                f'{saved.tag}: its EMA was saved at ZeRO stage {header["zero_stage"]} on '
                f'{header["world_size"]} ranks, and this run has stage {stage} on {ranks}; '
                'load_ema_checkpoint loads it into any layout'
            )
        targets = {f'shard/{n}': t for n, t in self._unpadded(self._shards).items()}
        buffers = {f'buffer/{n}': b for n, b in self._buffers.items()}
        pairs = []
        for owner, kind, tensors in ((rank(), 'shard/', targets), (0, 'buffer/', buffers)):
            names = [name for name in saved.names(owner) if name.startswith(kind)]
            values = {name: saved.tensor(owner, name) for name in names}
            _require_same(values, tensors, saved.tag / shard_name(owner))
            pairs += [(target, values[name]) for name, target in tensors.items()]
        self.ema.drop_copies()
        self._wrapper.before_write()
        for target, value in pairs:
            target.copy_(value)
        self.take_header(header)

    def take_header(self, saved: Mapping[str, str]) -> None:
        """Takes the decay, warm-up and number of updates of a tag's average: `EmaFiles.header`."""
        self.decay, self.num_updates = float(saved['decay']), int(saved['num_updates'])
        if 'warmup' in saved:
            warmup = json.loads(saved['warmup'])
            self.warmup = EmaWarmup(**warmup) if warmup else None

    @torch.no_grad()
    def load_whole(self, weights: Mapping[str, Flat], where: str) -> None:
        """Takes this rank's part of averaged weights, whatever layout they come from.

        Args:
            weights: name -> tensor, of every trained parameter and persistent buffer at least.
            where: the checkpoint's path, for errors.

        Raises:
            CheckpointMismatch: for weights of another model; before anything is changed.
        """
        self._require_own_weights('load_ema_checkpoint')
        layout, own_rank = self._wrapper.partitioning()
        # Buffers that are not persistent are in no state dict: the model has made its own.
        keys = self.engine.module.state_dict(keep_vars=True).keys()
        buffers = {n: b for n, b in self._buffers.items() if n in weights or n in keys}
        shapes = {**shapes_of(layout), **{n: tuple(b.shape) for n, b in buffers.items()}}
        names = [n for n, s in shapes.items() if n not in weights or tuple(weights[n].shape) != s]
        if names:
            raise CheckpointMismatch(
                f'{where}: its EMA is of another model: {len(names)} of {len(shapes)} tensors are '
                f'not in it or have another shape, {names[:5]} among them'
            )
        self.ema.drop_copies()
        self._wrapper.before_write()
        for shard, runs in zip(self._shards.values(), owned(layout, own_rank), strict=True):
            fill(shard, runs, weights)
        for name, buffer in buffers.items():
            buffer.copy_(weights[name].whole())

    def _require_own_weights(self, call: str) -> None:
        if self._wrapper.holds_average:
            raise ConfigError(
                f'{call} inside swapped_in: the average is where the weights belong, and this '
                'average holds the weights. Leave the block first'
            )

    def _note_swap(self, is_swapped_in: bool, holds_average: bool) -> None:
        self.is_swapped_in, self._wrapper.holds_average = is_swapped_in, holds_average
        torch.clear_autocast_cache()  # of the weights that were in place

    def _unpadded(self, shards: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Views without the alignment padding, in the layout in which DeepSpeed saves masters."""
        return dict(zip(shards, self._wrapper.unpadded(list(shards.values())), strict=True))

    @torch.no_grad()
    def _exchange_masters(self) -> None:
        self._wrapper.before_write()
        for name, master in self._wrapper.masters().items():
            shard = self._shards[name]
            copy = shard.detach().clone()
            shard.data.copy_(master.data)
            master.data.copy_(copy)
        self._wrapper.push_masters()

    @torch.no_grad()
    def _set_buffers(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, buffer in self.engine.module.named_buffers():
            buffer.copy_(values[name])


def _copy_to_average(buffer: torch.Tensor) -> torch.Tensor:
    """A copy to average: in float32 where it is floating point."""
    dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
    return buffer.detach().to(dtype, copy=True)


def _require_same(
    values: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], path: Path
) -> None:
    shapes, other = ({n: t.shape for n, t in tensors.items()} for tensors in (values, targets))
    names = [n for n in sorted(shapes.keys() | other.keys()) if shapes.get(n) != other.get(n)]
    if names:
        raise CheckpointMismatch(f'{path}: made for another model; differs in {few(names)}')
