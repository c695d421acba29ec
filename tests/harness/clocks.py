"""Streams and events, which CPUs do not have, with the vector clocks of torch's sanitizer.

    with Clocks() as clocks:
        ...  # make an engine, train
    clocks.races

DeepSpeed then takes its side streams, as on a GPU. What runs is computed at once and in order, so
the numbers are right; that nothing but luck orders two accesses on a GPU is seen in the clocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from torch.cuda._sanitizer import EventHandler
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

_numbers = itertools.count(1)


class _Event:
    def __init__(self, owner: Clocks) -> None:
        self._owner, self.number = owner, next(_numbers)
        owner.clocks._handle_event_creation(self.number)

    def record(self, stream: _Stream | None = None) -> None:
        stream = stream or self._owner.current
        self._owner.clocks._handle_event_record(self.number, stream.number)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._owner.clocks._handle_event_synchronization(self.number)


class _Stream:
    def __init__(self, owner: Clocks, number: int | None = None) -> None:
        self._owner = owner
        self.number = next(_numbers) if number is None else number
        owner.clocks._handle_stream_creation(self.number)

    def wait_event(self, event: _Event) -> None:
        self._owner.clocks._handle_event_wait(event.number, self.number)

    def wait_stream(self, other: _Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event(self._owner)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._owner.clocks._handle_stream_synchronization(self.number)


class Clocks(TorchDispatchMode):
    """Gives the CPU accelerator streams, and notes unordered accesses to the same memory.

    A collective counts as work of the stream that it is called on, as NCCL orders it; a read of a
    number by the host waits for the stream. Memory is told apart by its storage.

    Attributes:
        races: "OPERATION on stream N after OPERATION on stream M", each once, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clocks = EventHandler()
        self._default = self.current = _Stream(self, 0)
        self._alive: list[torch.UntypedStorage] = []  # an address is not used again
        self.races: dict[str, None] = {}

    def __enter__(self) -> Clocks:
        accelerator = get_accelerator()
        clocks = self.clocks
        self._patch = mock.patch.multiple(
            type(accelerator),
            is_synchronized_device=mock.Mock(return_value=False),
            Stream=property(lambda _: lambda **more: _Stream(self)),
            Event=property(lambda _: lambda **more: _Event(self)),
            stream=lambda _, stream: self._on(stream),
            current_stream=lambda _, index=None: self.current,
            default_stream=lambda _, index=None: self._default,
            synchronize=lambda _, index=None: clocks._handle_device_synchronization(),
        )
        self._record = mock.patch.object(torch.Tensor, 'record_stream')
        self._patch.start()
        self._record.start()
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._record.stop()
        self._patch.stop()

    @contextmanager
    def _on(self, stream: _Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        written, read = set(), set()
        arguments = func._schema.arguments
        pairs = [*zip(arguments, args, strict=False)]
        pairs += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
        for argument, value in pairs:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            writes |= func.namespace == 'c10d' and 'input' not in argument.name
            (written if writes else read).update(self._memory(value))
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if views:  # it touches no memory
            return result
        written |= self._memory(result)
        stream = self.current.number
        names: dict[int, list[str]] = {pointer: [] for pointer in written | read}
        for error in self.clocks._handle_kernel_launch(
            stream, read - written, written, written, str(func), names
        ):
            before = error.previous_access
            self.races[
                f'{func} on stream {stream} after {before.operator} on stream {before.stream}'
            ] = None
        if func is torch.ops.aten._local_scalar_dense.default:
            self.current.synchronize()
        return result

    def _memory(self, tree: Any) -> set[int]:
        storages = [
            t.untyped_storage() for t in _pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)
        ]
        self._alive += storages
        return {s.data_ptr() for s in storages if s.nbytes()}
