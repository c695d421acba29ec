"""Copies of tensors that are made later, piece by piece, by whichever threads ask for them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from internvl_ds.errors import CheckpointError, few

# A thread that must go on waits for one piece of another thread at most: about a millisecond.
_PIECE = 4 << 20

# Device and address of a tensor's storage.
Memory = tuple[str, int]


def memory_of(tensor: torch.Tensor) -> Memory:
    """What tensors have in common that are views of the same memory."""
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def memories_of(tree: Any) -> set[Memory]:
    """`memory_of` all tensors in nested dicts, lists and tuples; nothing of empty ones."""
    if isinstance(tree, torch.Tensor):
        return {memory_of(tree)} if tree.numel() else set()
    if isinstance(tree, Mapping):
        return memories_of(list(tree.values()))
    return set().union(*map(memories_of, tree)) if isinstance(tree, list | tuple) else set()


class Seen(NamedTuple):
    """A tensor, and torch's count of the writes to it."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Seen:
        """The tensor as it is now."""
        return cls(tensor, 0 if tensor.is_inference() else tensor._version)


def require_unwritten(tensors: Iterable[Seen]) -> None:
    """Raises CheckpointError where a tensor was written to since it was seen."""
    shapes = {str(tuple(t.tensor.shape)) for t in tensors if t.version != Seen.of(t.tensor).version}
    if shapes:
        raise CheckpointError(
            f'tensors of the state (of shape {few(sorted(shapes))}) were written to, past the '
            'optimizer and this package, while CHECKPOINT.ASYNC copied them: call '
            'internvl_ds.checkpoint.async_save.wait() before such a write, or set '
            "CHECKPOINT.ASYNC_COPY 'at once'"
        )


class Copies:
    """Tensors that are still to be copied, in order.

    Whoever is about to write to one of them calls `finish` first. A write to one that did not is
    noticed by torch's count of them, and is an error of the save: it could hold half of either.

    Attributes:
        error: why what was copied is no copy; None if nothing has failed.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._left: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        self._tensors: list[Seen] = []
        self._turn = threading.Condition()
        self._under_way = 0
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self._tensors

    def add(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Puts a copy off, of a tensor into one in host memory of the same shape and dtype."""
        self._tensors.append(Seen.of(source))
        self._left.extend(_pieces(source, target))
        if source.is_cuda and source.device not in self._streams:
            self._streams[source.device] = torch.cuda.Stream(source.device)

    def seal(self) -> None:
        """Ends the adding: what the device was told to do before now comes before the copies."""
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))

    def finish(self) -> None:
        """Copies what no other thread is at, and returns when all is copied; on any thread.

        A failure is kept in ``error``.
        """
        if self.done:
            return
        try:
            while (piece := self._take()) is not None:
                try:
                    self._copy(*piece)
                finally:
                    self._put_down()
        except Exception as error:
            self.error = self.error or error
            self._left.clear()
        with self._turn:
            self._turn.wait_for(lambda: not self._under_way)
            self._compare()

    def drop(self) -> None:
        """Gives up what is left; returns when no thread is at it any more."""
        self._left.clear()
        with self._turn:
            self._turn.wait_for(lambda: not self._under_way)
            self._tensors = []

    def _take(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        with self._turn:
            if not self._left:
                return None
            self._under_way += 1
            return self._left.popleft()

    def _put_down(self) -> None:
        with self._turn:
            self._under_way -= 1
            if not self._under_way:
                self._turn.notify_all()

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if not source.is_cuda:
            target.copy_(source)
            return
        stream = self._streams[source.device]
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            copied = stream.record_event()
        copied.synchronize()

    def _compare(self) -> None:
        tensors, self._tensors = self._tensors, []
        try:
            require_unwritten(tensors)
        except CheckpointError as error:
            self.error = self.error or error


def _pieces(
    source: torch.Tensor, target: torch.Tensor
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    if not source.is_contiguous():
        return [(source, target)]
    size = max(1, _PIECE // source.element_size())
    return zip(source.view(-1).split(size), target.view(-1).split(size), strict=True)
