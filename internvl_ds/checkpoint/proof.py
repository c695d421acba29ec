"""The proof of a save: each rank's files are read by the reader that a resume uses.

Only the pickles and headers are read, no tensor (see `outline`). Files only; knows no ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internvl_ds.checkpoint.formats.ema_files import open_safetensors
from internvl_ds.checkpoint.formats.outline import outline
from internvl_ds.checkpoint.formats.state_json import read_state
from internvl_ds.checkpoint.formats.zero_shards import TagShards, masters_in
from internvl_ds.checkpoint.frozen.frozen_file import joined
from internvl_ds.checkpoint.restore import model_shapes
from internvl_ds.checkpoint.tag.manifest import file_rank
from internvl_ds.checkpoint.tag.places import place_of
from internvl_ds.errors import CheckpointError, few
from internvl_ds.zero.partition import Layout
from internvl_ds.zero.wrapper import Wrapper


@dataclass(frozen=True)
class Wanted:
    """The required content of a save's files, taken from the engine when the save begins.

    Attributes:
        shapes: name -> whole shape of every parameter and buffer of the module's state dict.
        trained: the parameters that the optimizer has, without further names of tied ones.
        groups: their names by parameter group, for stage 0, whose files do not say them.
        layout, rank: how their masters are partitioned; None where no file holds them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    trained: frozenset[str]
    groups: Sequence[Sequence[str]] | None
    layout: Layout | None
    rank: int


def wanted_of(wrapper: Wrapper, groups: Sequence[Sequence[str]] | None) -> Wanted:
    """The required content of a save of this engine; ``groups``: see `Wanted`."""
    shapes = model_shapes(wrapper.engine.module)
    if wrapper.client is None:
        return Wanted(shapes, frozenset(), None, None, 0)
    layout, rank = wrapper.partitioning()
    layout_in_files = layout if wrapper.partitioned else None
    return Wanted(shapes, wrapper.trained_names(), groups, layout_in_files, rank)


def prove(staging: Path, names: Iterable[str], wanted: Wanted) -> None:
    """Raises CheckpointError where the reader refuses one of this rank's files ``names``, or where
    one lacks what it must hold; the error names the file, and the class, parameter or buffer.
    """
    contents: dict[Path, Any] = {}
    for name in sorted(names):
        path = place_of(staging, name)
        if name.endswith('.json'):
            read_state(path)
        elif name.endswith('.safetensors'):
            with open_safetensors(path):
                pass
        elif name.endswith('.pt'):
            contents[path] = joined(staging, path, outline(path), outline=True)
    for path, content in contents.items():
        if path.name.endswith('_optim_states.pt') and wanted.layout is not None:
            _prove_partition(path, content, wanted)
        elif path.name.endswith('_model_states.pt'):
            _prove_fragments(path, content)
            if file_rank(path.name) == 0:
                _prove_model(TagShards(staging, contents), wanted)


def _prove_model(shards: TagShards, wanted: Wanted) -> None:
    path, shapes = shards.model_files[0], shards.shapes()
    gaps = [name for name in wanted.shapes if name not in shapes]
    if gaps:
        raise CheckpointError(
            f'{path}: {len(gaps)} tensors of the module are not in it: {few(gaps)}'
        )
    changes = [
        f'{name} {shapes[name]} in place of {shape}'
        for name, shape in wanted.shapes.items()
        if tuple(shapes[name]) != tuple(shape)
    ]
    if changes:
        raise CheckpointError(f'{path}: tensors have another shape than in the module: {changes}')
    groups = shards.groups()
    if not all(name for group in groups for name in group):
        groups = [list(group) for group in wanted.groups or groups]
    count = Counter(name for group in groups for name in group)
    frozen_shapes = (shards.head.get('frozen_param_shapes') or {}) if shards.zero_stage == 3 else {}
    count.update(frozen_shapes.keys())
    repeats = [name for name, number in count.items() if number > 1]
    omissions = sorted(wanted.trained - count.keys())
    if repeats or omissions:
        raise CheckpointError(
            f'{path}: the state of trained parameters is in it twice ({few(repeats) or "none"}) or '
            f'not at all ({few(omissions) or "none"}): make the optimizer over each parameter once'
        )
    if not shards.zero_stage:
        lengths = [len(g['params']) for g in shards.plain_optimizer().get('param_groups', ())]
        of_engine = list(map(len, groups))
        if lengths != of_engine:
            sizes = f'groups of {few(lengths)} tensors, and the engine of {few(of_engine)}'
            raise CheckpointError(f'{path}: its optimizer has {sizes}')


def _prove_partition(path: Path, content: Mapping[str, Any], wanted: Wanted) -> None:
    assert wanted.layout is not None
    masters = masters_in(content['optimizer_state_dict'])
    if len(masters) != len(wanted.layout.groups):
        raise CheckpointError(
            f'{path}: holds the masters of {len(masters)} groups, of {len(wanted.layout.groups)}'
        )
    for group, (master, shapes) in enumerate(zip(masters, wanted.layout.groups, strict=True)):
        least = wanted.layout.least_length(wanted.rank, group)
        if not isinstance(master, torch.Tensor) or master.numel() < least:
            count = master.numel() if isinstance(master, torch.Tensor) else 0
            raise CheckpointError(
                f'{path}: holds {count} of {least} elements of the group of {few(list(shapes), 2)}'
            )


def _prove_fragments(path: Path, content: Mapping[str, Any]) -> None:
    """Stage 3: every frozen parameter has a slice in every rank's file."""
    shapes = content.get('frozen_param_shapes') or {}
    fragments = content.get('frozen_param_fragments') or {}
    ranks = int(content.get('dp_world_size') or 1)
    for name, shape in shapes.items():
        length = math.ceil(math.prod(shape) / ranks)
        count = fragments[name].numel() if name in fragments else 0
        if count < length:
            raise CheckpointError(f'{path}: holds {count} of {length} elements of {name}')
