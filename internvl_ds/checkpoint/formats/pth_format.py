"""The original's single file, ckpt_epoch_N.pth: its training state by parameter name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from internvl_ds.checkpoint.formats.optimizer_state import state_by_order
from internvl_ds.checkpoint.sources import weight_files
from internvl_ds.engine.lr_schedule import UPDATES
from internvl_ds.errors import CheckpointError, CheckpointMismatch, PretrainedError
from internvl_ds.zero.lazy_tensor import Flat, NamedState


def open_file(resume: str) -> Mapping[str, Any]:
    """Opens a .pth; CheckpointError where it cannot be read, or is more than data."""
    try:
        return weight_files.open_file(resume)
    except PretrainedError as error:
        raise CheckpointError(str(error)) from error


def weights_of_file(checkpoint: Mapping[str, Any], where: str) -> Mapping[str, torch.Tensor]:
    """A weight file's state dict: under 'model', 'module' or 'state_dict', or the file itself."""
    candidates = (checkpoint.get(key) for key in ('model', 'module', 'state_dict'))
    weights = next((value for value in candidates if isinstance(value, Mapping)), checkpoint)
    odd = next((key for key, value in weights.items() if not isinstance(value, torch.Tensor)), None)
    if odd is not None:
        raise CheckpointMismatch(
            f'{where}: {odd!r} is a {type(weights[odd]).__name__}, not a tensor: no state dict is '
            "under 'model', 'module' or 'state_dict', nor is the file one"
        )
    return weights


def state_of_file(
    checkpoint: Mapping[str, Any], where: str, candidates: Sequence[Sequence[Sequence[str]]]
) -> NamedState:
    """What training goes on from, by parameter name.

    Args:
        checkpoint: the file's content.
        where: its path, for errors.
        candidates: the names of each parameter group's tensors, in order, as the client built the
            groups and as they are now: the file has the one or the other.

    Raises:
        CheckpointError: when it holds no optimizer.
        CheckpointMismatch: when its optimizer has other groups or other shapes.
    """
    optimizer = checkpoint.get('optimizer')
    if not isinstance(optimizer, Mapping) or 'param_groups' not in optimizer:
        raise CheckpointError(
            f'{where}: holds no optimizer, so no training can go on from it. Evaluate it with '
            'EVAL_MODE, or start from its weights with MODEL.PRETRAINED.'
        )
    weights = {
        name.removeprefix('module.'): tensor
        for name, tensor in weights_of_file(checkpoint, where).items()
    }
    sizes = [len(group['params']) for group in optimizer['param_groups']]
    groups = next((c for c in candidates if [len(group) for group in c] == sizes), candidates[0])
    state = state_by_order(where, optimizer, groups, weights)
    updates = _updates(checkpoint, state.steps)
    return NamedState(
        where=where,
        layout='a single file',
        **state._asdict(),
        fixed={
            n: Flat.of(f'{where}: {n}', t) for n, t in weights.items() if n not in state.masters
        },
        counters={'global_steps': updates},
        optimizer=str(checkpoint.get('optimizer_class') or ''),
        fresh=not updates and checkpoint.get('epoch') is None,
    )


def _updates(checkpoint: Mapping[str, Any], steps: Mapping[str, Mapping[str, float]]) -> int:
    """How many updates were applied: what Adam counts, or else what the schedule says."""
    counts = [number['step'] for number in steps.values() if 'step' in number]
    if counts:
        return int(max(counts))
    schedule = checkpoint.get('schedule') or schedule_of_original(checkpoint)
    if schedule is None:
        # torch's own count their steps
        return int((checkpoint.get('lr_scheduler') or {}).get('last_epoch', 0))
    micro_batches = schedule.get('counts') != UPDATES
    return round(schedule['position'] / (schedule['group'] if micro_batches else 1))


def schedule_of_original(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where the schedule of an original's file stands, as `LrSchedule.restore` takes it.

    The original builds it over TRAIN.EPOCHS epochs of micro-batches (``t_initial``) and moves it by
    them. What is resumed says for itself what it counts.
    """
    schedule, config = checkpoint.get('lr_scheduler') or {}, checkpoint.get('config') or {}
    train = (config.get('TRAIN') if isinstance(config, Mapping) else None) or {}
    epoch, epochs = checkpoint.get('epoch'), train.get('EPOCHS')
    if not (isinstance(epoch, int) and epochs and schedule.get('t_initial')):
        return None
    position = round((epoch + 1) * schedule['t_initial'] / epochs)
    group = max(1, train.get('ACCUMULATION_STEPS') or 1)
    rest = round(schedule['t_initial'] / epochs) % group  # of an epoch, which moves nothing
    return {'position': position, 'moved': position - rest, 'group': group}
