"""Batches on the device, each of them copied there while the one before is computed with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from deepspeed.accelerator import get_accelerator


def on_device(
    batches: Iterable[tuple[torch.Tensor, ...]], device: torch.device
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields the batches with their tensors on a device.

    On a device with streams the next batch is taken, and its copy begun on a stream of its own,
    before the present one is given: from page-locked memory (DATA.PIN_MEMORY) the copy runs beside
    the computation.

    Args:
        batches: of a loader.
        device: of the engine.
    """
    accelerator = get_accelerator()
    if accelerator.Stream is None:
        for batch in batches:
            yield tuple(tensor.to(device) for tensor in batch)
        return
    side = accelerator.Stream()
    ahead = None
    for batch in batches:
        with accelerator.stream(side):
            tensors = tuple(tensor.to(device, non_blocking=True) for tensor in batch)
        taken, ahead = ahead, (tensors, side.record_event())
        if taken is not None:
            yield _ready(*taken)
    if ahead is not None:
        yield _ready(*ahead)


def _ready(tensors: tuple[torch.Tensor, ...], copied: torch.Event) -> tuple[torch.Tensor, ...]:
    """The tensors, for the present stream: it waits for the copy, and their memory for it."""
    stream = get_accelerator().current_stream()
    stream.wait_event(copied)
    for tensor in tensors:
        tensor.record_stream(stream)
    return tensors
