"""Frozen parameters that a tag omits, taken from the weights that they came from.

A tag says of each where it stands in which file, and what was made of it, and of each file's
tensors a digest: a file with other values is refused.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from yacs.config import CfgNode

from internvl_ds.checkpoint.frozen.frozen_bytes import entry_of
from internvl_ds.checkpoint.sources import downloads
from internvl_ds.checkpoint.sources.weight_files import open_file
from internvl_ds.errors import CheckpointError, InternvlDsError, PretrainedError
from internvl_ds.files.addresses import is_address, repository_at
from internvl_ds.zero.origins import Origin

_P = ParamSpec('_P')
_T = TypeVar('_T')

# What finds weights that the call under way names: a file may have another place now.
_named: contextvars.ContextVar[tuple[Callable[[], str], ...]] = contextvars.ContextVar(
    'named', default=()
)


class Omitted:
    """One parameter that a rank omits, or its slice of one.

    Attributes:
        origin: where it came from.
        dtype, shape: of the whole parameter.
        start, stop: the elements of it.
        length: elements that are kept of a slice, which zeros follow.
    """

    def __init__(
        self, origin: Origin, dtype: str, shape: list[int], start: int, stop: int, length: int
    ) -> None:
        self.origin, self.dtype, self.shape = origin, dtype, torch.Size(shape)
        self.start, self.stop, self.length = start, stop, length

    def to_list(self) -> list[Any]:
        """The form in a model file."""
        origin = self.origin
        place = [origin.source, list(origin.keys), list(origin.dtypes)]
        return [place, self.dtype, list(self.shape), self.start, self.stop, self.length]

    @classmethod
    def of(cls, said: Any) -> Omitted:
        """Reverses `to_list`."""
        (source, keys, dtypes), *rest = said
        return cls(Origin(source, tuple(keys), tuple(dtypes)), *rest)

    def piece(self, weights: Mapping[str, Any]) -> torch.Tensor:
        """Its elements as they are in the file, flat.

        Raises:
            KeyError, TypeError: when the file has no such tensor.
        """
        found: Any = weights
        for key in self.origin.keys:
            found = found[key]
        if not isinstance(found, torch.Tensor) or found.shape != self.shape:
            raise TypeError(f'{"/".join(self.origin.keys)} is no tensor of {tuple(self.shape)}')
        return found.detach().reshape(-1)[self.start : self.stop]

    def made_of(self, piece: torch.Tensor) -> torch.Tensor:
        """The values in the model, of its elements in the file."""
        for dtype in (*self.origin.dtypes, self.dtype):
            piece = piece.to(getattr(torch, dtype))
        return piece

    def outline(self, *, sharded: bool) -> torch.Tensor:
        """The tensor on the meta device."""
        shape = (self.length,) if sharded else self.shape
        return torch.empty(shape, dtype=getattr(torch, self.dtype), device='meta')

    def whole(self, piece: torch.Tensor, *, sharded: bool) -> torch.Tensor:
        """The tensor, of its elements in the file."""
        made = self.made_of(piece)
        if not sharded:
            return made.reshape(self.shape)
        if made.numel() == self.length:
            return made
        return torch.cat([made, made.new_zeros(self.length - made.numel())])


def named_in_config(call: Callable[_P, _T]) -> Callable[_P, _T]:
    """Wraps a function of a config: it seeks omitted weights in the files of the config, too."""

    @functools.wraps(call)
    def looking(*args: _P.args, **more: _P.kwargs) -> _T:
        config = args[0] if args else more.get('config')
        with looking_in(_pretrained_in(config), config):
            return call(*args, **more)

    return looking


@contextlib.contextmanager
def looking_in(paths: Iterable[str], config: Any) -> Iterator[None]:
    """Within the block, omitted weights are also sought in these files or at these addresses."""
    addresses = [repository_at(path) or path for path in paths]
    files_first = sorted(addresses, key=is_address)
    token = _named.set(tuple(partial(downloads.local, each, config) for each in files_first))
    try:
        yield
    finally:
        _named.reset(token)


def pieces_of(weights: Mapping[str, Any], omitted: Mapping[str, Omitted]) -> dict[str, Any]:
    """The elements of parameters in opened weights; digests are of these."""
    return {name: one.piece(weights) for name, one in omitted.items()}


def take(
    tag: Path, omitted: Mapping[str, Omitted], digests: Mapping[str, str], *, sharded: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads the omitted parameters from their sources.

    Args:
        tag: the directory, for errors; beside it is looked too.
        omitted: by name.
        digests: of each source's tensors.
        sharded: whether they are slices.

    Returns:
        The parameters by name, and of each source where it was.

    Raises:
        CheckpointError: where a source is not there, or has other values.
    """
    found: dict[str, torch.Tensor] = {}
    places = {}
    for source, digest in digests.items():
        own = {name: one for name, one in omitted.items() if one.origin.source == source}
        places[source], pieces = _find(tag, source, own, digest)
        for name, piece in pieces.items():
            found[name] = own[name].whole(piece, sharded=sharded)
    return found, places


def _find(
    tag: Path, source: str, omitted: Mapping[str, Omitted], digest: str
) -> tuple[str, dict[str, torch.Tensor]]:
    said = []
    beside = str(tag.parent / os.path.basename(source))
    tried: set[str] = set()
    for place in (lambda: source, lambda: beside, *_named.get()):
        try:
            path = place()
        except PretrainedError as error:  # of a download
            said.append(str(error))
            continue
        if path in tried or not os.path.exists(path):
            said += [f'{path} is not there'] if path == source else []
            continue
        tried.add(path)
        try:
            pieces = pieces_of(open_file(path), omitted)
            actual = entry_of(pieces).digest
        except (InternvlDsError, KeyError, TypeError, OSError) as error:
            said.append(f'{path} has not these tensors ({error})')
            continue
        if actual == digest:
            return path, pieces
        said.append(f'{path} has other values (their xxh3-128 is {actual}, not {digest})')
    raise CheckpointError(
        f'{tag}: omits {len(omitted)} frozen parameters (CHECKPOINT.FROZEN), which were loaded '
        f'from {source}; {"; ".join(said)}. Name its present place, by MODEL.PRETRAINED or '
        "PRETRAINED of the model's section (`internvl-ds ckpt`: --pretrained), or put it next to "
        'the tag'
    )


def _pretrained_in(config: Any) -> Iterator[str]:
    """The paths and addresses of weights in a configuration."""
    with contextlib.suppress(AttributeError, KeyError):
        parts = [(k, v) for k, v in config.MODEL.items() if isinstance(v, CfgNode)]
        for kind, part in [('', config.MODEL), *parts]:
            path = str(part.get('PRETRAINED') or '')
            own = kind in ('', str(config.MODEL.get('TYPE', '')).upper())  # another's is a default
            if path and (own or os.path.exists(path)):
                yield path
