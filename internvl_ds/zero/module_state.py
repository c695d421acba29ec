"""Checks that DeepSpeed can train a module, and that tags of any stage can hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from internvl_ds.errors import CheckpointError, ConfigError, few
from internvl_ds.zero.parameters import is_sharded

BARE = (
    'give initialize the bare module, and call the engine: it averages the gradients over the ranks'
)


def require_bare(model: nn.Module) -> None:
    """Raises ConfigError for an engine, a DataParallel, or what torch.compile returned.

    Also for one inside the model.
    """
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel | DataParallel | DeepSpeedEngine):
            where = f' ({name} of it)' if name else ''
            raise ConfigError(f'the model is a {type(module).__name__}{where}: {BARE}')
        if '_orig_mod' in module._modules:
            where = f'{name} of the model' if name else 'the model'
            raise ConfigError(
                f'{where} is what torch.compile returned, in whose tags all names would begin with '
                "_orig_mod: give initialize the module itself, and set TRAIN.COMPILE 'inductor', "
                'or call compile() of the module, which keeps its names'
            )


def require_real(model: nn.Module) -> None:
    """Raises ConfigError for complex trained parameters, which DeepSpeed reduces wrongly."""
    names = [n for n, p in model.named_parameters() if p.requires_grad and p.is_complex()]
    if names:
        raise ConfigError(
            f'{len(names)} trained parameters are complex, which DeepSpeed cannot train: '
            f'{few(names)}. Keep their real view as the parameter (torch.view_as_real) and make it '
            'complex in the forward pass (torch.view_as_complex), or freeze them.'
        )


def require_statistics(model: nn.Module) -> None:
    """Refuses batch norms with half-precision weights and statistics in float32.

    DeepSpeed casts the parameters of a module and leaves its buffers; torch takes both or neither,
    and would say so in the first forward pass.

    Raises:
        ConfigError: names them, and what to set.
    """
    mixed = [
        f'{name} ({type(module).__name__})'
        for name, module in model.named_modules()
        if type(module).__module__.split('.')[0] in ('torch', 'timm')
        and isinstance(mean := getattr(module, 'running_mean', None), torch.Tensor)
        and isinstance(weight := getattr(module, 'weight', None), torch.Tensor)
        and weight.itemsize < mean.itemsize
    ]
    if mixed:
        raise ConfigError(
            f'{len(mixed)} batch norms have weights in half precision and running statistics in '
            f'float32, which they cannot compute with: {few(mixed)}. Set AMP_OPT_LEVEL O1 '
            '(autocast), or MODEL.SYNC_BN True, whose batch norms can; or '
            "/data_types/buffer_dtype 'bf16' or 'fp16', which rounds the statistics too"
        )


@contextmanager
def keeping_buffers(model: nn.Module) -> Iterator[None]:
    """Makes ``deepspeed.initialize`` in the block leave the module's buffers in their dtype.

    DeepSpeed before 0.19 rounds them to half precision with the parameters.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    yield
    if not hasattr(DeepSpeedEngine, '_cast_module_mixed_precision'):
        for prefix, module in model.named_modules(remove_duplicate=False):
            for name, now in module._buffers.items():
                made = buffers.get(f'{prefix}.{name}' if prefix else name)
                if made is not None and now is not None and made.dtype != now.dtype:
                    module._buffers[name] = made.to(now.device)


def require_plain_state(model: nn.Module) -> None:
    """Refuses a module whose state dict is not its parameters and buffers under their own names.

    Stage 3 keeps those alone, and training goes on in another layout from those alone: what
    ``get_extra_state`` gives would be dropped, what a hook renames would not be found. The
    ConfigError names the first entries.
    """
    tensors: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    state = model.state_dict(keep_vars=True)
    entries = [name for name, value in state.items() if tensors.get(name) is not value]
    absentees = [n for n, _ in model.named_parameters(remove_duplicate=False) if n not in state]
    if entries or absentees:
        raise ConfigError(
            f'the state dict of the model has {len(entries)} entries that are no parameters or '
            f'buffers of these names ({few(entries) or "none"}), and lacks {len(absentees)} '
            f'parameters ({few(absentees) or "none"}): no checkpoint of every ZeRO stage could '
            'hold them. Keep what get_extra_state gives in registered buffers, and leave names as '
            'they are (no hooks of the state dict, no checkpoint_wrapper)'
        )


def require_sendable(model: nn.Module) -> None:
    """Raises ConfigError for parameters that DeepSpeed cannot send to other ranks, or cut up."""
    faults: dict[str, Callable[[nn.Parameter], bool]] = {
        'no dimension: declare them with the shape (1,)': lambda p: not p.dim(),
        'no elements: leave them out, with None in their place': lambda p: not p.numel(),
        'their elements in another order than a contiguous tensor: make them contiguous '
        '(model.to(memory_format=torch.contiguous_format); the images may be channels_last)': (
            lambda p: not p.is_contiguous()
        ),
    }
    for what, has_fault in faults.items():
        parameters = model.named_parameters()
        if names := [n for n, p in parameters if not is_sharded(p) and has_fault(p)]:
            raise ConfigError(f'{few(names)}: {len(names)} parameters have {what}')


def require_dtypes(model: nn.Module) -> None:
    """Refuses at ZeRO stage 3 parameters of dtypes at which DeepSpeed or torch would die later.

    DeepSpeed takes the dtype of the whole module from its first parameter (parameter_offload.py:167
    of 0.19.8), wherever the accelerator knows fp16. gloo of torch 2.9 gathers no complex tensors.

    Raises:
        ConfigError: names the first of them.
    """
    whole = {name: p for name, p in model.named_parameters() if not is_sharded(p)}
    name, first = next(iter(whole.items()), ('', None))
    if first is not None and first.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(
            f'{name}, the first parameter, is {first.dtype}, which DeepSpeed would take for the '
            'dtype of the model at ZeRO stage 3: put it into a submodule that is registered '
            'later (the parameters of a module come before those of its submodules)'
        )
    names = [name for name, p in whole.items() if p.is_complex()]
    if names and torch.__version__ < '2.14':
        raise ConfigError(
            f'{few(names)}: {len(names)} frozen parameters are complex, which torch '
            f'{torch.__version__} cannot gather at ZeRO stage 3: use torch>=2.14, or register them '
            'as buffers'
        )


def require_as_made(
    module: nn.Module, names: Mapping[Any, str], buffers: Mapping[str, Any]
) -> None:
    """Refuses to save parameters or buffers that a newly built model would not have.

    Args:
        module: of an engine.
        names: its parameters when the engine was made, and their names.
        buffers: `shapes_of_buffers` then.

    Raises CheckpointError, which names the first of them.
    """
    parameters = set(module.parameters())
    old_names = [name for p, name in names.items() if p not in parameters]
    new_names = [n for n, p in module.named_parameters() if p not in names]
    if old_names or new_names:
        raise CheckpointError(
            'the module has other parameters than when its engine was made '
            f'(new: {few(new_names) or "none"}; gone: {few(old_names) or "none"}), and the '
            'optimizer has the old ones: change the module before initialize'
        )
    now = shapes_of_buffers(module)
    changes = [
        f'{name} {buffers.get(name, "none")} -> {now.get(name, "none")}'
        for name in sorted(buffers.keys() | now.keys())
        if buffers.get(name) != now.get(name)
    ]
    if changes:
        raise CheckpointError(
            f'{len(changes)} buffers are not as they were when the engine was made: '
            f'{few(changes)}. No fresh model could load them: register them in their final shape '
            'before initialize, or with persistent=False'
        )


def shapes_of_buffers(module: nn.Module) -> dict[str, Any]:
    """Name -> shape of each buffer of the module's state dict."""
    state = module.state_dict(keep_vars=True)
    return {
        n: tuple(b.shape) for n, b in module.named_buffers(remove_duplicate=False) if n in state
    }


def tied_names(module: nn.Module) -> dict[str, str]:
    """Every further name of a shared parameter -> its first."""
    first: dict[int, str] = {}
    further = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            further[name] = first[id(parameter)]
    return further
