"""The fp32 master weights that a rank owns, how they are cut up, and pushing them to the module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.errors import CheckpointError, ConfigError, few
from internvl_ds.zero.partition import Layout, Runs, Slices
from internvl_ds.zero.persistent_params import gather_persistent


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
        held = {id(p) for group in optimizer.param_groups for p in group['params']}
        return {n: p for n, p in engine.module.named_parameters() if id(p) in held}
    return {f'{i:04d}': group for i, group in enumerate(groups)}


def trained_names(engine: DeepSpeedEngine) -> frozenset[str]:
    """The parameters that the engine's optimizer has: what it trains, whatever is frozen since."""
    if engine.zero_optimization_stage():
        return frozenset(name for group in engine._get_zero_param_shapes() for name in group)
    return frozenset(master_weights(engine))


def untrained_names(engine: DeepSpeedEngine) -> list[str]:
    """The parameters that require a gradient, and that the engine's optimizer does not have.

    They were frozen when the engine was made: DeepSpeed decides then what it trains.
    """
    trained = trained_names(engine)
    return [
        name
        for name, p in engine.module.named_parameters()
        if p.requires_grad and name not in trained and getattr(p, 'ds_numel', p.numel())
    ]


def require_trained_unfrozen(engine: DeepSpeedEngine) -> None:
    """Refuses an update where a parameter was frozen that the engine was made to train.

    The client's own optimizer skips it then, as in plain PyTorch. DeepSpeed's optimizers give it a
    gradient of zero, with which momentum and weight decay move it on.

    Raises:
        ConfigError: names the first of them.
    """
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:
        return
    groups = getattr(optimizer, 'bit16_groups', None) or optimizer.fp16_groups
    frozen = [p for group in groups for p in group if not p.requires_grad]
    if frozen:
        raise ConfigError(
            f'{len(frozen)} parameters were frozen after the engine was made to train them: '
            f'{few([engine.param_names[p] for p in frozen])}. Momentum and weight decay would go '
            f'on moving them ({type(optimizer).__name__} gives them a gradient of zero). Freeze '
            'before initialize: save, and make the engine anew over the rest from the weights of '
            'the tag (MODEL.PRETRAINED); only ZeRO stage 0 in fp32 or torch autocast can go on'
        )


def require_module_as_made(engine: DeepSpeedEngine) -> None:
    """Refuses to save a module whose parameters are others than when the engine was made.

    Raises:
        CheckpointError: names the first that were added or replaced since.
    """
    own = set(engine.module.parameters())
    replaced = [name for p, name in engine.param_names.items() if p not in own]
    known = engine.param_names.keys()
    added = [n for n, p in engine.module.named_parameters() if p not in known]
    if replaced or added:
        raise CheckpointError(
            'the module has other parameters than when its engine was made '
            f'(new: {few(added) or "none"}; gone: {few(replaced) or "none"}), and the optimizer '
            'has the old ones: change the module before initialize'
        )


@contextmanager
def frozen_as_made(engine: DeepSpeedEngine) -> Iterator[None]:
    """Lets DeepSpeed's save and load meet the parameters as frozen as when the engine was made.

    They take ``requires_grad`` to say what the optimizer has. Where a script has frozen or unfrozen
    a parameter since, a save at stage 3 would write it twice or not at all, and a load at stages 2
    and 3 would look for what is not there.
    """
    if not engine.zero_optimization_stage() or engine.basic_optimizer is None:
        yield
        return
    trained = trained_names(engine)
    named = dict(engine.module.named_parameters())
    since = {p: p.requires_grad for n, p in named.items() if p.requires_grad != (n in trained)}
    for parameter, required in since.items():
        parameter.requires_grad_(not required)
    try:
        yield
    finally:
        for parameter, required in since.items():
            parameter.requires_grad_(required)


def kept_on_nvme(engine: DeepSpeedEngine) -> list[str]:
    """Which of 'offload_optimizer' and 'offload_param' the engine has on NVMe."""
    settings = {
        'offload_optimizer': engine.zero_offload_optimizer(),
        'offload_param': engine.zero_offload_param(),
    }
    return [
        name
        for name, offload in settings.items()
        if offload is not None and str(getattr(offload.device, 'value', offload.device)) == 'nvme'
    ]


def partitioning(engine: DeepSpeedEngine) -> tuple[Layout, int]:
    """How `master_weights` lie on the ranks, and which rank of the layout this one is.

    The flat tensors of `master_weights`, in order, are the layout's groups. At stage 0 every rank
    holds all of them.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if not stage:
        shapes = {n: tuple(p.shape) for n, p in engine.module.named_parameters()}
        return Slices([{name: shapes[name]} for name in master_weights(engine)], 1), 0
    groups = engine._get_zero_param_shapes()
    if stage == 3:
        return Slices(groups, world_size()), rank()
    gaps, sizes = optimizer.round_robin_bit16_padding, optimizer.partition_size
    return Runs(groups, gaps, sizes, world_size()), rank()


def push_masters(engine: DeepSpeedEngine) -> None:
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
