"""The classification head: fits one of another length; the 22K -> 1K rows."""

from __future__ import annotations

import enum
import functools

import torch
from torch import Tensor

from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained.transforms import Note, Result, Specs, State, is_weight, read

CLASSES_22K = 21841
CLASSES_1K = 1000

# The one WordNet id of ImageNet-1K that ImageNet-22K lacks (teddy), and the id that stands in.
_STAND_INS = {'n04399382': 'n04398044'}


class HeadPlan(enum.Enum):
    """What to do about the checkpoint's head."""

    KEEP = 'load it as it is'
    RESCALE = "drop it, and scale the model's own by 0.001"
    TAKE_ROWS = 'load the ImageNet-1K rows of it'


def plan_head(state: State, specs: Specs, rand_init: bool) -> HeadPlan:
    """Decides about the head by the lengths of ``head.bias`` in the checkpoint and the model.

    PretrainedError when the lengths differ and no setting says what to do about it.
    """
    bias, spec = state.get('head.bias'), specs.get('head.bias')
    if not is_weight(bias) or spec is None or not len(bias.shape) == len(spec.shape) == 1:
        return HeadPlan.KEEP
    have, want = bias.shape[0], spec.shape[0]
    if have == want:
        return HeadPlan.KEEP
    if rand_init:
        return HeadPlan.RESCALE
    if (have, want) == (CLASSES_22K, CLASSES_1K):
        return HeadPlan.TAKE_ROWS
    raise PretrainedError(
        f'head.bias: {have} classes in the checkpoint, {want} in the model; set '
        f"MODEL.NUM_CLASSES to {have} to take the checkpoint's head, or TRAIN.RAND_INIT_FT_HEAD "
        f"to True to start from the model's own"
    )


def fit_head(state: State, plan: HeadPlan) -> Result:
    """Applies a plan to the checkpoint's ``head.*``; the model's own head is not touched here."""
    if plan is HeadPlan.RESCALE:
        entries = {key: value for key, value in state.items() if not key.startswith('head.')}
        note = Note("dropped the checkpoint's head; the model's own is scaled by 0.001")
        return Result(entries, (note,))
    if plan is HeadPlan.TAKE_ROWS:
        rows = imagenet_22k_rows()
        heads = {
            key: read(state[key])[rows]
            for key in ('head.weight', 'head.bias')
            if is_weight(state.get(key)) and state[key].shape[0] == CLASSES_22K
        }
        note = Note(f'head {CLASSES_22K} -> {CLASSES_1K}: took its ImageNet-1K rows')
        return Result({**state, **heads}, (note,))
    return Result(state)


def imagenet_22k_rows() -> Tensor:
    """The row of each ImageNet-1K class in an ImageNet-22K head of 21841 rows.

    Returns:
        int64, (1000,), on the CPU. Class 850 (n04399382) is not in ImageNet-22K and takes the row
        of n04398044, which class 849 has too: 999 rows are distinct.
    """
    return torch.tensor(_rows(), dtype=torch.int64)


def slice_22k_logits(logits: Tensor) -> Tensor:
    """Selects the ImageNet-1K classes of ImageNet-22K logits: (..., 21841) -> (..., 1000).

    Raises:
        PretrainedError: when the last dimension is not 21841.
    """
    if logits.ndim == 0 or logits.shape[-1] != CLASSES_22K:
        shape = tuple(logits.shape)
        raise PretrainedError(f'logits of shape {shape}: the last dimension is not {CLASSES_22K}')
    return logits.index_select(-1, imagenet_22k_rows().to(logits.device))


@functools.lru_cache(maxsize=1)
def _rows() -> tuple[int, ...]:
    # timm takes seconds to import, and only ImageNet-22K heads need it.
    from timm.data import ImageNetInfo

    of_22k = ImageNetInfo('imagenet-22k').label_names()
    of_1k = ImageNetInfo('imagenet-1k').label_names()
    index = {wnid: row for row, wnid in enumerate(of_22k)}
    gaps = {wnid for wnid in of_1k if wnid not in index}
    if (len(of_22k), len(of_1k)) != (CLASSES_22K, CLASSES_1K) or gaps != set(_STAND_INS):
        raise PretrainedError(
            f'the ImageNet class lists of this timm are not the known ones: {len(of_22k)} and '
            f'{len(of_1k)} classes, absent from ImageNet-22K: {sorted(gaps)}'
        )
    return tuple(index[_STAND_INS.get(wnid, wnid)] for wnid in of_1k)
