"""A tag written as one file: the original's .pth, or weights as .safetensors. No process group.

Tensors are merged one at a time, straight into the file.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from yacs.config import CfgNode

from internvl_ds.checkpoint.formats.client_state import saved_state
from internvl_ds.checkpoint.formats.ema_files import EmaFiles, ema_flats
from internvl_ds.checkpoint.formats.tensor_files import safetensors_header
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.sources.open_weights import open_weights
from internvl_ds.engine.param_groups import PER_GROUP_LISTS
from internvl_ds.errors import CheckpointError
from internvl_ds.files import replacing
from internvl_ds.files.yaml_text import parse_yaml
from internvl_ds.zero.lazy_tensor import Flat, NamedState
from internvl_ds.zero.loss_scale import LossScale


def write_original(tag: Path, target: Path) -> None:
    """Writes what the original's ``save_checkpoint`` would have: its code can resume from it.

    Args:
        tag: a tag of ours, or of plain DeepSpeed with what its client_state says.
        target: the .pth file; replaced when all of it is on disk.
    """
    shards = TagShards(tag)
    state = saved_state(shards)
    scale = state.get('loss_scale') or {}
    first = LossScale().state_dict()  # for a run in fp32 or bf16, which has no loss scale
    del first['hysteresis_left']  # which torch.amp.GradScaler does not have
    settings = shards.settings()
    engine_groups = [list(group['param_names']) for group in settings]
    groups = state.get('optimizer_groups') or engine_groups
    index_of = {name: i for i, names in enumerate(engine_groups) for name in names}
    # Frozen parameters may be in the client's groups; an empty group has no settings of its own.
    places = [
        list(dict.fromkeys(index_of[n] for n in names if n in index_of)) or [0] for names in groups
    ]
    indices = [several[0] for several in places]
    source = shards.named_state(groups)
    source.require_all_named()
    fillers: dict[int, Flat] = {}
    tree: dict[str, Any] = {
        'model': _blank_weights(shards.in_order(source.weights()), source.aliases, fillers),
        'optimizer': _blank_optimizer(
            source, groups, [_shared([settings[i] for i in several]) for several in places], fillers
        ),
        'optimizer_class': state.get('optimizer_class'),
        'lr_scheduler': _expand(state.get('lr_scheduler'), indices, len(engine_groups)),
        'schedule': state.get('schedule'),  # what it counts, for a load of ours
        'max_accuracy': state.get('max_accuracy') or 0.0,
        'epoch': state.get('epoch'),
        'config': CfgNode(parse_yaml(state['config'])) if state.get('config') else None,
        'amp': {key: scale.get(key, value) for key, value in first.items()},
        'max_accuracy_ema': state.get('max_accuracy_ema'),
        'ema_decay': state.get('ema_decay'),
    }
    if state.get('class_names'):
        tree['class_names'] = state['class_names']
    ema_files = EmaFiles(tag)
    if ema_files:
        average = shards.in_order(ema_flats(ema_files))
        tree['model_ema'] = _blank_weights(average, source.aliases, fillers)
    _write_tree(tree, fillers, target)


def write_weights(
    flats: Mapping[str, Flat],
    classes: list[str] | None,
    target: Path,
    dtype: torch.dtype = torch.float32,
    largest: int = 1 << 40,
) -> list[Path]:
    """Writes weights as a .pth (under 'model'), or as .safetensors; returns the files.

    Args:
        flats: name -> tensor; read one at a time.
        classes: class names to keep beside the weights, if any.
        target: the file; replaced when all of it is on disk. Its suffix says which kind.
        dtype, largest: of .safetensors, as in `write_safetensors`.
    """
    if target.suffix == '.safetensors':
        return _write_parts(flats, classes, target, dtype, largest)
    fillers: dict[int, Flat] = {}
    tree: dict[str, Any] = {'model': _blank_weights(flats, {}, fillers)}
    _write_tree(tree | ({'class_names': classes} if classes else {}), fillers, target)
    return [target]


def write_safetensors(
    tag: Path, target: Path, dtype: torch.dtype, *, ema: bool, largest: int
) -> list[Path]:
    """Writes weights only; returns the files, the index last.

    Args:
        tag: a tag.
        target: the .safetensors file, or what its parts are named after.
        dtype: of floating-point tensors in the file.
        ema: the averaged weights in place of the trained ones.
        largest: bytes of a file; more are several files with an index beside them.
    """
    average = EmaFiles(tag)
    if ema and not average:
        raise CheckpointError(f'{tag}: holds no EMA')
    shards = TagShards(tag)
    flats = ema_flats(average) if ema else weights_of_tag(shards)
    return _write_parts(flats, saved_state(shards).get('class_names'), target, dtype, largest)


def weights_of_tag(shards: TagShards) -> dict[str, Flat]:
    """Name -> tensor of everything in a state dict; fp32 masters where the tag has them."""
    weights = shards.named_weights()
    if shards.optim_files and shards.zero_stage in (1, 2):
        weights.update(shards.named_state().weights())
    elif shards.zero_stage == 0 and 'fp32_groups' in (shards.head.get('optimizer') or {}):
        groups = shards.groups()
        if all(name for group in groups for name in group):
            weights.update(shards.named_state().weights())
    return shards.in_order(weights)


def _write_parts(
    flats: Mapping[str, Flat],
    classes: list[str] | None,
    target: Path,
    dtype: torch.dtype,
    largest: int,
) -> list[Path]:
    parts = _split(flats, dtype, largest)
    names = [target.name]
    if len(parts) > 1:
        stem = target.name.removesuffix('.safetensors')
        names = [f'{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors' for i in range(len(parts))]
    paths = [target.with_name(name) for name in names]
    try:
        with contextlib.ExitStack() as stack:  # left from the last to the first: the index last
            if len(parts) > 1:
                paths.append(target.with_name(f'{target.name}.index.json'))
                where = {name: names[i] for i, part in enumerate(parts) for name in part}
                total = sum(_size(flat, dtype) for flat in flats.values())
                metadata = {'total_size': total, **({'class_names': classes} if classes else {})}
                tree = {'metadata': metadata, 'weight_map': where}
                index = stack.enter_context(replacing(paths[-1]))
                index.write((json.dumps(tree, indent=1) + '\n').encode())
            for part, name in zip(reversed(parts), reversed(names), strict=True):
                file = stack.enter_context(replacing(target.with_name(name)))
                _write_safetensors(file, {name: flats[name] for name in part}, dtype, classes)
    except OSError as error:
        raise CheckpointError(f'{target}: cannot be written: {error}') from error
    return paths


def _write_tree(tree: dict[str, Any], fillers: Mapping[int, Flat], target: Path) -> None:
    try:
        with replacing(target) as file:
            # The file that is open, whatever its name is meanwhile: torch takes names only here.
            proc_path = f'/proc/self/fd/{file.fileno()}'
            with torch.serialization.skip_data():
                torch.save(tree, proc_path)
            with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
                _fill_tree(open_weights(proc_path), tree, fillers)
    except OSError as error:
        raise CheckpointError(f'{target}: cannot be written: {error}') from error


def _blank_weights(
    flats: Mapping[str, Flat], aliases: Mapping[str, str], fillers: dict[int, Flat]
) -> dict[str, torch.Tensor]:
    """Tensors of untouched memory, for the pickle; ``fillers`` gives their values."""
    blank = {n: _blank(flat, fillers) for n, flat in flats.items() if n not in aliases}
    return {name: blank[aliases.get(name, name)] for name in flats}


def _blank(flat: Flat, fillers: dict[int, Flat]) -> torch.Tensor:
    tensor = torch.empty(flat.shape, dtype=flat.dtype)
    fillers[id(tensor)] = flat
    return tensor


def _blank_optimizer(
    source: NamedState,
    groups: list[list[str]],
    settings: list[dict[str, Any]],
    fillers: dict[int, Flat],
) -> dict[str, Any]:
    """A torch optimizer's state dict, its parameters numbered through the groups."""
    state, param_groups, number = {}, [], 0
    for names, of_group in zip(groups, settings, strict=True):
        values = {k: v for k, v in of_group.items() if k != 'param_names'}
        numbers = list(range(number, number + len(names)))
        param_groups.append({**values, 'param_names': list(names), 'params': numbers})
        for name in names:
            flats = dict(source.moments.get(name, {}))
            for key, value in source.steps.get(name, {}).items():
                flats[key] = Flat.of(key, torch.tensor(value))
            if flats:
                state[number] = {key: _blank(flat, fillers) for key, flat in flats.items()}
            number += 1
    return {'state': state, 'param_groups': param_groups}


def _shared(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """What groups that were one have in common: a Muon's is divided for ZeRO, see `divided`."""
    if len(settings) == 1:
        return settings[0]
    first = {k: v for k, v in settings[0].items() if k != 'param_names'}
    return {k: v for k, v in first.items() if all(repr(s.get(k)) == repr(v) for s in settings)}


def _expand(schedule: Any, indices: list[int], groups: int) -> Any:
    """A scheduler's state for the client's groups: a value for each of them."""
    if not isinstance(schedule, Mapping):
        return schedule
    return {
        key: [value[i] for i in indices]
        if key in PER_GROUP_LISTS and isinstance(value, list) and len(value) == groups
        else value
        for key, value in schedule.items()
    }


def _fill_tree(target: Any, blank: Any, fillers: Mapping[int, Flat]) -> None:
    if isinstance(blank, torch.Tensor):
        if blank.numel():
            fillers[id(blank)].copy_to(target.view(-1))
    elif isinstance(blank, Mapping):
        for key, value in blank.items():
            _fill_tree(target[key], value, fillers)
    elif isinstance(blank, list | tuple):
        for item, value in zip(target, blank, strict=True):
            _fill_tree(item, value, fillers)


def _split(flats: Mapping[str, Flat], dtype: torch.dtype, largest: int) -> list[list[str]]:
    """The names in each file: in order, none above ``largest`` but for a single tensor."""
    parts: list[list[str]] = [[]]
    room = largest
    for name, flat in flats.items():
        room -= _size(flat, dtype)
        if parts[-1] and room < 0:
            parts.append([])
            room = largest - _size(flat, dtype)
        parts[-1].append(name)
    return parts


def _dtype_in_file(flat: Flat, dtype: torch.dtype) -> torch.dtype:
    return dtype if flat.dtype.is_floating_point else flat.dtype


def _size(flat: Flat, dtype: torch.dtype) -> int:
    return flat.numel * _dtype_in_file(flat, dtype).itemsize


def _write_safetensors(
    file: IO[bytes], flats: Mapping[str, Flat], dtype: torch.dtype, classes: list[str] | None
) -> None:
    metadata = {'class_names': json.dumps(classes)} if classes else {}  # metadata is text only
    kinds = {name: (_dtype_in_file(flat, dtype), flat.shape) for name, flat in flats.items()}
    file.write(safetensors_header(kinds, {'format': 'pt', **metadata}))
    for flat in flats.values():
        if flat.numel:
            tensor = flat.whole(_dtype_in_file(flat, dtype)).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
