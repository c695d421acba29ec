"""The files of an average in a tag: sharded as `ShardedEma` keeps it, or whole as timm does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from internvl_ds.checkpoint.formats import tensor_files
from internvl_ds.checkpoint.formats.client_state import average_of, holds_average
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.sources import weight_files
from internvl_ds.checkpoint.tag.discovery import read_manifest
from internvl_ds.checkpoint.tag.identity import require_identity
from internvl_ds.checkpoint.tag.manifest import Identity
from internvl_ds.errors import CheckpointError, InternvlDsError, brief
from internvl_ds.files.ema_shard import shard_name
from internvl_ds.files.reading import interpreting, parse_json
from internvl_ds.zero.lazy_tensor import Flat

WHOLE = 'ema.safetensors'
# In the header of a whole average: the names of what is as the tag's weights are.
AS_IN_MODEL = 'as_in_model'
_WARMUP = {'gamma', 'power', 'min_decay'}


class EmaFiles:
    """The average of a tag.

    Attributes:
        tag: the directory.
        sharded, whole: whether it is kept in the one form or the other.
        of_script: whether it is in the client_state of a tag of plain DeepSpeed.
    """

    def __init__(self, tag: Path) -> None:
        self.tag = tag
        self._manifest = read_manifest(tag)
        self.of_script = self._manifest is None and holds_average(TagShards(tag))
        names = set() if self._manifest is None else self._manifest.files.keys()
        self.sharded, self.whole = shard_name(0) in names, WHOLE in names

    def __bool__(self) -> bool:
        """Whether the tag holds an average."""
        return self.sharded or self.whole or self.of_script

    @cached_property
    def header(self) -> dict[str, str]:
        """Of a sharded average: decay, num_updates, warmup, zero_stage and world_size."""
        with self.open(shard_name(0)) as file:
            header = file.metadata() or {}
        with interpreting(self.tag / shard_name(0), CheckpointError):
            decay, warmup = float(header['decay']), parse_json(header.get('warmup', 'null'))
            numbers = [int(header[k]) for k in ('num_updates', 'zero_stage', 'world_size')]
            is_valid = warmup is None or (
                warmup.keys() <= _WARMUP and all(float(v) >= 0 for v in warmup.values())
            )
            if not (is_valid and 0 <= decay <= 1 and min(numbers) >= 0):
                raise ValueError(f'decay {decay}, numbers {numbers}, warmup {brief(warmup)}')
        return header

    def names(self, rank: int = 0) -> list[str]:
        """The sorted names of the tensors in one rank's part: ``shard/...`` and ``buffer/...``."""
        with self.open(shard_name(rank)) as file:
            return sorted(file.keys())

    def tensor(self, rank: int, name: str) -> torch.Tensor:
        """One tensor of one rank's part; CheckpointError where file or tensor is missing."""
        with self.open(shard_name(rank)) as file:
            if name not in file.keys():  # noqa: SIM118
                raise CheckpointError(f'{self.tag / shard_name(rank)}: has no {name}')
            return file.get_tensor(name)

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """Opens one of the files; CheckpointError for another rank's or another save's."""
        path = self.tag / name
        with open_safetensors(path) as file:
            if self._manifest is not None:
                require_identity(path, identity_in(file.metadata()), self._manifest.header)
            yield file


def ema_flats(files: EmaFiles) -> dict[str, Flat]:
    """Name -> averaged tensor of the model's state dict, not read yet, from any EMA of a tag."""
    flats = all_flats(files)
    return {name: flats[name] for name in TagShards(files.tag).shapes() if name in flats}


def all_flats(files: EmaFiles) -> dict[str, Flat]:
    """As `ema_flats`, with the buffers that are not persistent, where the average keeps them."""
    path = files.tag
    if files.whole:
        with files.open(WHOLE) as file:
            same = parse_json((file.metadata() or {}).get(AS_IN_MODEL, '[]'))
            tensors = weight_files.open_file(str(path / WHOLE))
        weights = TagShards(path).named_weights() if same else {}
        found = {name: weights[name] for name in same}
        return found | {name: Flat.of(f'{path}: {name}', t) for name, t in tensors.items()}
    tag = TagShards(path)
    if files.of_script:
        weights = tag.named_weights()
        average = average_of(tag)
        weights.update({n: Flat.of(f'{path}: {n}', t) for n, t in average.items()})
        weights.update({alias: weights[name] for alias, name in tag.aliases().items()})
        return weights
    names = files.names()
    shards = [n for n in names if n.startswith('shard/')]
    if tag.zero_stage:
        read = cache(lambda r, g: files.tensor(r, shards[g]).reshape(-1))
        averages = tag.flats(read)
    else:
        averages = {
            n.removeprefix('shard/'): Flat.of(f'{path}: {n}', files.tensor(0, n)) for n in shards
        }
    keys = {n.removeprefix('buffer/'): n for n in names if n.startswith('buffer/')}
    buffers = {n: Flat.of(f'{path}: {key}', files.tensor(0, key)) for n, key in keys.items()}
    weights = {**tag.named_weights(), **averages, **buffers}
    weights.update({alias: weights[name] for alias, name in tag.aliases().items()})
    return weights


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Opens a file of tensors; CheckpointError where it cannot be read."""
    try:
        with tensor_files.open_safetensors(path) as file:
            yield file
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, InternvlDsError):
            raise
        raise CheckpointError(f'{path}: cannot be read: {error}') from error


def with_identity(metadata: Mapping[str, str] | None, identity: Identity) -> dict[str, str]:
    """A header that says whose file it is."""
    return {**(metadata or {}), Identity.KEY: json.dumps(identity.to_dict())}


def identity_in(metadata: Mapping[str, str] | None) -> Any:
    """What a header says of whose file it is; None where it says nothing."""
    try:
        return parse_json((metadata or {}).get(Identity.KEY, 'null'))
    except ValueError:
        return None
