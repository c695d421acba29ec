"""An exponential moving average of the weights that shards with the model.

Each rank averages the fp32 masters that it owns (all of them at stage 0), so an update is local
memory traffic only. To evaluate, average and masters change places and the masters are pushed to
the module, as DeepSpeed does after a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError, safe_open

from internvl_ds.comm import rank, world_size
from internvl_ds.engine import engine_of
from internvl_ds.errors import CheckpointError, CheckpointMismatch
from internvl_ds.persistent import gather_persistent

FILE_PATTERN = 'ema_rank_*.safetensors'


class EmaFile(NamedTuple):
    """What one rank writes of an average.

    Attributes:
        name: of the file.
        tensors: name -> values.
        metadata: for the file's header.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] | None


class ShardedEma:
    """The average of a training engine's weights: ``ema = decay * ema + (1 - decay) * weights``.

    Buffers are averaged where they are floating point and copied where not, as timm's ModelEmaV3
    does; frozen parameters are not kept.

    Attributes:
        decay: the share of the old average that stays in an update.
        num_updates: how many updates have been made.
    """

    def __init__(self, model: Any, decay: float = 0.9998) -> None:
        """Starts the average at the engine's present weights.

        Args:
            model: an engine, or a module or optimizer that belongs to one.
            decay: in [0, 1].
        """
        self.engine: DeepSpeedEngine = engine_of(model)
        self.decay = decay
        self.num_updates = 0
        self._shards = {name: t.detach().clone() for name, t in master_weights(self.engine).items()}
        self._buffers = {n: b.detach().clone() for n, b in self.engine.module.named_buffers()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights after a step into the average; a skipped step changes nothing.

        Call it on every rank after each boundary. It talks to no other rank.
        """
        if not self.engine.was_step_applied():
            return
        masters = master_weights(self.engine)
        torch._foreach_lerp_(
            list(self._shards.values()), [masters[n] for n in self._shards], 1.0 - self.decay
        )
        for name, buffer in self.engine.module.named_buffers():
            average = self._buffers[name]
            if average.is_floating_point():
                average.lerp_(buffer.to(average.dtype), 1.0 - self.decay)
            else:
                average.copy_(buffer)
        self.num_updates += 1

    @contextmanager
    def swapped_in(self, engine: DeepSpeedEngine | None = None) -> Iterator[None]:
        """Lets the engine compute with the averaged weights; they are put back at the end.

        Every rank must enter and leave it. The weights come back bit for bit, also after an
        exception. No step may be made inside.

        Args:
            engine: accepted for symmetry; the engine of this average is used.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def shard_file(self) -> EmaFile:
        """This rank's part, as it goes into a tag: views of the average, not copies."""
        tensors = {f'shard/{n}': t for n, t in self._unpadded(self._shards).items()}
        if rank() == 0:
            tensors.update({f'buffer/{n}': t for n, t in self._buffers.items()})
        metadata = {
            'decay': repr(float(self.decay)),
            'num_updates': str(self.num_updates),
            'zero_stage': str(self.engine.zero_optimization_stage()),
            'world_size': str(world_size()),
        }
        return EmaFile(f'ema_rank_{rank()}.safetensors', tensors, metadata)

    @torch.no_grad()
    def load_shard(self, directory: Path) -> None:
        """Reads this rank's part back from a tag of the same world size and ZeRO stage.

        Raises:
            CheckpointMismatch: when the tag was saved by another layout, or for another model.
        """
        stage, ranks = self.engine.zero_optimization_stage(), world_size()
        with _open(directory / 'ema_rank_0.safetensors') as file:
            saved = file.metadata()
            held = set(file.keys())
            buffers = {
                n: file.get_tensor(f'buffer/{n}') for n in self._buffers if f'buffer/{n}' in held
            }
        if (int(saved['zero_stage']), int(saved['world_size'])) != (stage, ranks):
            raise CheckpointMismatch(
                f'{directory}: its EMA was saved at ZeRO stage {saved["zero_stage"]} on '
                f'{saved["world_size"]} ranks, and this run has stage {stage} on {ranks}; this '
                'version restores an EMA into the same layout only'
            )
        own = directory / f'ema_rank_{rank()}.safetensors'
        targets = self._unpadded(self._shards)
        with _open(own) as file:
            names = {n.removeprefix('shard/') for n in file.keys() if n.startswith('shard/')}  # noqa: SIM118
            differing = sorted(names ^ set(targets))
            if differing or set(buffers) != set(self._buffers):
                raise CheckpointMismatch(
                    f'{own}: made for another model; differs in {differing[:5]}'
                )
            for name, target in targets.items():
                value = file.get_tensor(f'shard/{name}')
                if value.shape != target.shape:
                    raise CheckpointMismatch(
                        f'{own}: {name} has {tuple(value.shape)}, not {tuple(target.shape)}'
                    )
                target.copy_(value)
        for name, value in buffers.items():
            self._buffers[name].copy_(value)
        self.decay = float(saved['decay'])
        self.num_updates = int(saved['num_updates'])

    def _unpadded(self, shards: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Views without the alignment padding, in the layout in which DeepSpeed saves masters."""
        if self.engine.zero_optimization_stage() in (1, 2):
            strip = self.engine.optimizer._get_groups_without_padding
            return dict(zip(shards, strip(list(shards.values())), strict=True))
        return shards

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, master in master_weights(self.engine).items():
            _swap(self._shards[name], master)
        for name, buffer in self.engine.module.named_buffers():
            _swap(self._buffers[name], buffer)
        _push_masters(self.engine)


def master_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The fp32 weights that this rank owns, by parameter name or by group."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        groups = optimizer.fp32_partitioned_groups_flat
    elif stage:
        groups = optimizer.single_partition_of_fp32_groups
    elif hasattr(optimizer, 'fp32_groups'):
        names = {id(p): n for n, p in engine.module.named_parameters()}
        return {
            names[id(p)]: master
            for lows, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for p, master in zip(lows, masters, strict=True)
        }
    else:
        return {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    return {f'{i:04d}': group for i, group in enumerate(groups)}


def _swap(a: torch.Tensor, b: torch.Tensor) -> None:
    kept = a.detach().clone()
    a.data.copy_(b.data)
    b.data.copy_(kept)


def _push_masters(engine: DeepSpeedEngine) -> None:
    """Makes the module compute with the present fp32 masters, as after a step. A collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # frees the whole copies of persistent parameters
        for i, (low, master) in enumerate(
            zip(
                optimizer.fp16_partitioned_groups_flat,
                optimizer.fp32_partitioned_groups_flat,
                strict=True,
            )
        ):
            low.data.copy_(master.data)
            optimizer._unflatten_partitioned_parameters(i)
        gather_persistent(optimizer)
    elif stage:
        optimizer.update_lp_params()
    elif hasattr(optimizer, 'fp32_groups'):
        for lows, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, master in zip(lows, masters, strict=True):
                low.data.copy_(master.data)


def has_ema(tag: Path) -> bool:
    """Whether a tag holds a sharded average."""
    return any(tag.glob(FILE_PATTERN))


def read_ema_shards(tag: Path) -> list[dict[str, torch.Tensor]]:
    """Each rank's tensors as written, keys ``shard/...`` and ``buffer/...``, in rank order.

    Raises:
        CheckpointError: when a rank's file is missing.
    """
    with _open(tag / 'ema_rank_0.safetensors') as file:
        ranks = int(file.metadata()['world_size'])
    shards = []
    for r in range(ranks):
        path = tag / f'ema_rank_{r}.safetensors'
        if not path.is_file():
            raise CheckpointError(f'{path}: missing; the EMA was saved by {ranks} ranks')
        with _open(path) as file:
            shards.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return shards


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, 'pt')
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f'{path}: cannot be read: {error}') from error
    with file as opened:
        yield opened
