"""Counts what a training update asks of the other ranks and of the device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from internvl_ds.dist.reduce import reduce_tensor
from internvl_ds.dist.rendezvous import exchange
from internvl_ds.engine.ema import ShardedEma
from internvl_ds.engine.grad_scaler import NativeScalerWithGradNormCount
from internvl_ds.tools.selftest.row import Row, judged
from internvl_ds.tools.selftest.subject import (
    CLIP,
    DECAY,
    FP32,
    LIMIT,
    bare_update,
    loss_of,
    make_engine,
    settings,
)

# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api/types.html
_SENT_BY_NCCL = {
    torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.bool,
}  # fmt: skip
# Whether an update is finite, which the bare engine of stage 0 does not ask in fp32.
_TO_SKIP = 1
# The last is counted: at stage 3 DeepSpeed learns the order of the modules in those before.
_UPDATES = 3


class Traffic(TorchDispatchMode):
    """Notes the collectives of a block and counts its reads of the device by the host.

    Attributes:
        collectives: (name, dtype, elements) of each tensor, in order.
        faults: those whose tensor is on another device, or of a dtype that NCCL does not send.
        reads: of a number, such as ``float(loss)``, or of a tensor into the host's memory.
        sent: tensors that were made of the host's numbers, as by ``torch.tensor(1.0, device=...)``,
            which waits for the device; not counted on CPUs.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.collectives: list[tuple[str, str, int]] = []
        self.faults: list[str] = []
        self.reads = self.sent = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == 'c10d':
            tensors = [t for t in _pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            for tensor in tensors:
                self._note(func._opname, tensor)
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += args[0].device.type == self._device.type
        elif func is torch.ops.aten.lift_fresh.default and self._device.type != 'cpu':
            self.sent += result.device.type == self._device.type
        elif self._device.type != 'cpu' and func._opname in ('_to_copy', 'copy_'):
            source = args[0] if func._opname == '_to_copy' else args[1]
            self.reads += source.device.type == self._device.type and result.device.type == 'cpu'
        return result

    def _note(self, name: str, tensor: torch.Tensor) -> None:
        self.collectives.append((name, str(tensor.dtype), tensor.numel()))
        if tensor.device.type != self._device.type or tensor.dtype not in _SENT_BY_NCCL:
            self.faults.append(f'{name} of {tensor.dtype} on {tensor.device}')


def traffic_row(stages: Sequence[int], precision: str = FP32) -> Row:
    """Updates through the bridge and by a bare engine. Collective: every rank calls it."""
    faults: list[str] = []
    counts = []
    for stage in stages:
        engine, optimizer = make_engine(settings(precision), stage)
        scaler, average = NativeScalerWithGradNormCount(), ShardedEma(engine, DECAY)
        for update in range(_UPDATES):
            with Traffic(engine.device) as bridge:
                loss = loss_of(engine, update)
                scaler(loss, optimizer, CLIP, engine.parameters())
                average.update(engine)
        with Traffic(engine.device) as bare:
            bare_update(engine, loss_of(engine, _UPDATES))
        with Traffic(engine.device) as others:
            reduce_tensor(loss)
            with average.swapped_in(), torch.no_grad():
                loss_of(engine, 0)
        engine.destroy()
        counts.append(f'{bridge.reads} and {bare.reads}')
        if bridge.reads > max(bare.reads, _TO_SKIP):
            faults.append(
                f'stage {stage}: the host reads the device {bridge.reads} times in an update '
                f'through the bridge, {bare.reads} times in one of the bare engine'
            )
        if bridge.sent > bare.sent:
            faults.append(
                f'stage {stage}: the host sends the device {bridge.sent} numbers in an update '
                f'through the bridge, {bare.sent} in one of the bare engine'
            )
        for noted in (bridge, others):
            faults += [f'stage {stage}: {fault}' for fault in noted.faults]
        orders = exchange(
            f'selftest order {stage}', _digest(bridge.collectives + others.collectives), LIMIT
        )
        if others_differ := [r for r, order in enumerate(orders) if order != orders[0]]:
            faults.append(
                f'stage {stage}: ranks {others_differ} make other collectives than rank 0'
            )
    found = f'reads by the host in an update, bridge and bare engine: {", ".join(counts)}'
    return judged('collectives and reads', faults, found)


def _digest(collectives: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(collectives).encode()).hexdigest()
