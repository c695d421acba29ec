"""A copy of a state tree in host buffers, which the next copy uses again.

Background saves write from the copy while training changes the original. What is only written to at
an update is copied beside the next forward and backward, see `Copies`.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Container, Mapping
from typing import Any

import torch

from internvl_ds.checkpoint.copying.copies import Copies, Memory, Seen, memory_of

logger = logging.getLogger(__name__)

# A smaller tensor is copied at once: to put it off would cost as much.
_SMALL = 1 << 16


class Snapshot:
    """Host buffers that state trees are copied into.

    The buffers stay for the next round, because fresh memory costs more than the copy (the kernel
    clears every page of it); they are pinned where there is a GPU, for its copies to be fast.

    Attributes:
        copies: what `copy` has put off.
        originals: what the limit has left uncopied of the last round: the trees have the tensors
            themselves then, and must be written before these change.
    """

    def __init__(self) -> None:
        self.copies = Copies()
        self.originals: list[Seen] = []
        self._spares: dict[int, list[torch.UntypedStorage]] = defaultdict(list)
        self._buffers: dict[int, list[torch.UntypedStorage]] = defaultdict(list)
        self._left = 0
        self._steady: Container[Memory] = ()

    def begin(self, steady: Container[Memory] = (), limit: int = 0) -> None:
        """Frees all buffers for a new copy; the last copy becomes invalid.

        Buffers that the last round had no use for are given up.

        Args:
            steady: memory (`memory_of`) that changes only after ``copies.finish()``.
            limit: bytes of buffers for tensors in it; 0 for as many as it takes.
        """
        self.copies = Copies()
        self._spares, self._buffers = self._buffers, defaultdict(list)
        self._steady, self._left, self.originals = steady, limit or 1 << 62, []

    def copy(self, tree: Any) -> Any:
        """Copies nested dicts, lists and tuples; of tensors only the values they show.

        Tensors that share memory in ``tree`` do not in the copy. What is neither a container nor a
        tensor is deep-copied.
        """
        if isinstance(tree, torch.Tensor):
            return self._copy_tensor(tree.detach())
        if tree is None or isinstance(tree, int | float | str | torch.Size):
            return tree
        if type(tree) in (dict, OrderedDict):
            result = copy.copy(tree)  # with the attributes that a state dict carries
            for key, value in tree.items():
                result[key] = self.copy(value)
            return result
        if type(tree) in (list, tuple):
            return type(tree)(self.copy(value) for value in tree)
        if isinstance(tree, tuple) and hasattr(tree, '_make'):  # a named tuple
            return type(tree)._make(self.copy(value) for value in tree)
        return copy.deepcopy(tree)

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        waits = size >= _SMALL and memory_of(tensor) in self._steady
        if waits and size > self._left:
            self.originals.append(Seen.of(tensor))
            return tensor
        if self._spares[size]:
            storage = self._spares[size].pop()
        else:
            storage = _host_buffer(size).untyped_storage()
        self._buffers[size].append(storage)
        target = torch.empty(0, dtype=tensor.dtype).set_(storage).view(tensor.shape)
        if waits:
            self._left -= size
            self.copies.add(tensor, target)
            return target
        return target.copy_(tensor)


def _host_buffer(size: int) -> torch.Tensor:
    """Bytes in host memory; page-locked beside a GPU, where the system allows so much of it."""
    if size and torch.cuda.is_available():
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            logger.warning(
                'the copy for a background save is not page-locked, and takes longer: %s',
                str(error).partition('\n')[0],
            )
    return torch.empty(size, dtype=torch.uint8)


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        return sum(map(tensor_bytes, tree.values()))
    if isinstance(tree, list | tuple):
        return sum(map(tensor_bytes, tree))
    return 0
