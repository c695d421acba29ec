"""A checkpoint of any kind as parameters by name, read on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from internvl_ds.errors import CheckpointError, CheckpointMismatch
from internvl_ds.zero.partition import Place

# (rank, group) -> the flat tensor there, mapped into memory.
Source = Callable[[int, int], torch.Tensor]
_PIECE = 1 << 22  # elements of a mean in float64 at a time


class Flat:
    """A tensor, by the places of its elements in the flat tensors of one or more ranks.

    Attributes:
        shape: of the whole tensor.
    """

    def __init__(
        self, name: str, shape: Sequence[int], places: Sequence[Place], source: Source
    ) -> None:
        """Describes a tensor: its places in the order of its elements; ``name`` is for errors."""
        self.name, self.shape = name, torch.Size(shape)
        self._places, self._source = places, source

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Flat:
        """A whole tensor."""
        places = [Place(0, 0, 0, 0, tensor.numel())]
        return cls(name, tensor.shape, places, lambda *_: tensor.reshape(-1))

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return self.shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it was saved in."""
        place = self._places[0] if self._places else None
        return self._source(place.rank, place.group).dtype if place else torch.float32

    def pieces(self, start: int, stop: int) -> list[torch.Tensor]:
        """The elements ``start`` to ``stop``, in order, as views of where they lie.

        Raises:
            CheckpointError: when the shards do not hold them all.
        """
        pieces = []
        for place in self._places:
            first, last = max(start, place.start), min(stop, place.stop)
            if first >= last:
                continue
            flat = self._source(place.rank, place.group)
            begin = place.offset + first - place.start
            pieces.append(flat[begin : begin + last - first])
            if pieces[-1].numel() < last - first:
                raise CheckpointError(
                    f'{self.name} ends at element {begin + last - first} of group {place.group} of '
                    f'rank {place.rank}, and the shard has {flat.numel()}'
                )
        count = sum(piece.numel() for piece in pieces)
        if count < stop - start:
            raise CheckpointError(
                f'{self.name}: the shards hold {count} of {stop - start} elements'
            )
        return pieces

    def copy_to(self, target: torch.Tensor, start: int = 0) -> None:
        """Copies the `pieces` from ``start`` on into a 1-D tensor, as many elements as that has."""
        at = 0
        for piece in self.pieces(start, start + target.numel()):
            target[at : at + piece.numel()].copy_(piece)
            at += piece.numel()

    def whole(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor, in memory of its own, or mapped where it lies in one piece.

        By default it has the dtype that it was saved in.
        """
        if self.numel and len(self._places) == 1 and dtype in (None, self.dtype):
            return self.pieces(0, self.numel)[0].reshape(self.shape)
        target = torch.empty(self.numel, dtype=dtype or self.dtype)
        self.copy_to(target)
        return target.reshape(self.shape)


class Mean(Flat):
    """The mean of tensors of one shape: summed in float64, read as float32."""

    def __init__(self, flats: Sequence[Flat]) -> None:
        super().__init__(flats[0].name, flats[0].shape, (), lambda *_: torch.empty(0))
        self._flats = flats

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the mean is rounded to."""
        return torch.float32

    def pieces(self, start: int, stop: int) -> list[torch.Tensor]:
        """The mean of the elements ``start`` to ``stop``, a bounded number of them at a time."""
        pieces = []
        for first in range(start, stop, _PIECE):
            size = min(_PIECE, stop - first)
            total, addend = torch.zeros(2, size, dtype=torch.float64)
            for flat in self._flats:
                flat.copy_to(addend, first)
                total += addend
            pieces.append((total / len(self._flats)).to(self.dtype))
        return pieces


def fill(
    target: torch.Tensor, runs: Iterable[tuple[str, Place]], flats: Mapping[str, Flat]
) -> None:
    """Copies runs of parameters into one flat tensor; what lies between them stays.

    Args:
        target: a group's flat tensor, or a whole parameter of any shape.
        runs: parameter -> where its run lies in ``target``.
        flats: parameter -> its elements.
    """
    flat = target.view(-1) if target.is_contiguous() else target.flatten()
    for name, place in runs:
        end = place.offset + place.stop - place.start
        flats[name].copy_to(flat[place.offset : end], place.start)
    if not target.is_contiguous():
        target.copy_(flat.view(target.shape))


@dataclass
class NamedState:
    """The training state by parameter name.

    Attributes:
        where: the checkpoint's path.
        layout: what saved it, for the log: 'ZeRO stage 2 on 4 ranks in bf16'.
        masters: fp32 weights of the parameters that were trained.
        moments: parameter -> key of its optimizer state (exp_avg, momentum_buffer, ...) -> tensor.
        steps: parameter -> key -> number, for what the optimizer keeps as one number (step).
        fixed: frozen parameters and buffers.
        settings: parameter -> the settings of the group that it was in.
        optimizer: the class of the optimizer; '' where it is not known.
        fresh: whether it was saved before the first update.
        unnamed: state that is no parameter's by element or number, in words; '' for none.
        aliases: a further name of a tied parameter -> the name that it is saved under.
        counters: global_steps, skipped_steps and global_samples, where known.
    """

    where: str
    layout: str
    masters: Mapping[str, Flat]
    moments: Mapping[str, Mapping[str, Flat]]
    steps: Mapping[str, Mapping[str, float]]
    fixed: Mapping[str, Flat]
    aliases: Mapping[str, str] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    optimizer: str = ''
    fresh: bool = False
    unnamed: str = ''

    def require_all_named(self) -> None:
        """Raises CheckpointMismatch for state without parameter names."""
        if self.unnamed:
            raise CheckpointMismatch(
                f'{self.where}: {self.unnamed}: such state goes on only in the layout that it was '
                'saved in'
            )

    def weights(self) -> dict[str, Flat]:
        """Name -> tensor of everything in a state dict, tied names included."""
        tensors = {**self.fixed, **self.masters}
        return tensors | {alias: tensors[name] for alias, name in self.aliases.items()}
