"""DeepSpeed's model states without the frozen parameters, and put together again. Pure.

What is left is what DeepSpeed writes with ``exclude_frozen_parameters``: its own load takes it with
``load_module_strict=False``, and without that names the keys that are missing. The shapes of frozen
parameters stay, so that its ``zero_to_fp32.py`` fails where it is not told to leave these out,
and does not take the rest for all. One more entry, KEY, says what was taken out.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

import torch

from internvl_ds.checkpoint.formats.tensor_files import SAFETENSORS_DTYPES

KEY = 'internvl_ds_frozen'
_SHAPES, _FRAGMENTS = 'frozen_param_shapes', 'frozen_param_fragments'

State = dict[str, Any]


def split(
    state: Mapping[str, Any], frozen: Container[str], aliases: Mapping[str, str], *, sharded: bool
) -> tuple[State, dict[str, torch.Tensor]]:
    """Takes the frozen parameters out of what DeepSpeed would write.

    Args:
        state: of a ``*_model_states.pt``; it is not changed.
        frozen: names of parameters.
        aliases: every further name of a tied parameter -> its first.
        sharded: whether it is of stage 3, where each rank has a slice of each parameter.

    Returns:
        What is left, whose KEY has no 'file' yet, and the parameters (at stage 3 this rank's
        slices) by name. What the file format has no dtype for stays; so do buffers, which a frozen
        module in training mode may change.
    """
    module, fragments = state['module'], state.get(_FRAGMENTS) or {}
    source = fragments if sharded else module
    out = {
        name: tensor.detach()
        for name, tensor in source.items()
        if name in frozen and name not in aliases and tensor.dtype in SAFETENSORS_DTYPES
    }
    named = {key: aliases.get(key, key) for key in module}
    taken = {key: name for key, name in named.items() if name in out}
    if sharded:  # all that is whole in it stays; DeepSpeed leaves empty tensors for what is cut up
        taken = {key: name for key, name in taken.items() if not module[key].numel()}
    rest = copy.copy(module)  # with the attributes that a state dict carries
    for key in taken:
        del rest[key]
    apart = {
        'order': list(module),
        'taken': taken,
        'sharded': sharded,
        'fragments': list(fragments),
    }
    left = {name: tensor for name, tensor in fragments.items() if name not in out}
    # At stage 1 DeepSpeed states no shapes.
    shapes = state.get(_SHAPES) or {name: tensor.shape for name, tensor in out.items()}
    return {**state, 'module': rest, _SHAPES: shapes, _FRAGMENTS: left or None, KEY: apart}, out


def join(left: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> State:
    """Reverses `split`; the parameters are ``tensors``, not copies."""
    state = dict(left)
    apart = state.pop(KEY)
    rest, module = left['module'], copy.copy(left['module'])
    module.clear()
    for key in apart['order']:
        tensor = tensors[apart['taken'][key]] if key in apart['taken'] else rest[key]
        empty = apart['sharded'] and key in apart['taken']
        module[key] = torch.empty(0, dtype=tensor.dtype) if empty else tensor
    state['module'] = module
    if apart['fragments']:
        kept = left.get(_FRAGMENTS) or {}
        state[_FRAGMENTS] = {n: kept.get(n, tensors.get(n)) for n in apart['fragments']}
    else:
        state[_SHAPES] = None
    return state
