"""The classification head: fits one of another length; the 22K -> 1K rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from internvl_ds.errors import PretrainedError, few
from internvl_ds.pretrained.transforms import Note, Result, Specs, State, is_weight, read

CLASSES_22K = 21841
CLASSES_1K = 1000

# The one WordNet id of ImageNet-1K that ImageNet-22K lacks (teddy), and the id that stands in.
_STAND_INS = {'n04399382': 'n04398044'}


def other_layers(layers: Sequence[str], state: State, specs: Specs) -> tuple[str, ...]:
    """Those layers of the model's classifier that have another length in the checkpoint."""
    return tuple(layer for layer in layers if any(_lengths(layer, state, specs)))


def fit_head(layers: Sequence[str], rand_init: bool, state: State, specs: Specs) -> Result:
    """Fits classifier layers of another length; the model's own are not touched here.

    Args:
        layers: what `other_layers` returned.
        rand_init: drops them from the checkpoint; otherwise the ImageNet-1K rows are taken of a
            larger ImageNet.
        state: the checkpoint.
        specs: of the model.

    Raises:
        PretrainedError: when the lengths differ and no setting says what to do about it.
    """
    if not layers:
        return Result(state)
    if rand_init:
        prefixes = tuple(f'{layer}.' for layer in layers)
        entries = {key: value for key, value in state.items() if not key.startswith(prefixes)}
        names = '' if layers == ('head',) else f' ({few(layers)})'
        note = Note(f"dropped the checkpoint's head{names}; the model's own is scaled by 0.001")
        return Result(entries, (note,))
    out, notes = dict(state), []
    for layer in layers:
        lengths = list(_lengths(layer, state, specs))
        _, have, want = lengths[-1]
        rows = torch.tensor(_rows_for(*lengths[-1]), dtype=torch.int64)
        for key, length, _ in lengths:
            if length == have:
                out[key] = read(state[key])[rows.clamp(min=0)]
                out[key][rows < 0] = 0
        notes.append(Note(f'{layer} {have} -> {want}: took its ImageNet-1K rows'))
        if absent := _rows_of(have)[1]:
            notes.append(Note(
                f'{layer}: {len(absent)} classes of ImageNet-1K are not among the {have}, and '
                f'start from zeros: {few(absent)}',
                is_warning=True,
            ))  # fmt: skip
    return Result(out, tuple(notes))


def _lengths(layer: str, state: State, specs: Specs) -> Iterator[tuple[str, int, int]]:
    """Key, length in the checkpoint and in the model, of each tensor of which these differ."""
    for key, spec in specs.items():
        value = state.get(key) if key.startswith(f'{layer}.') else None
        if is_weight(value) and value.shape and spec.shape and value.shape[0] != spec.shape[0]:
            yield key, value.shape[0], spec.shape[0]


def _rows_for(key: str, have: int, want: int) -> tuple[int, ...]:
    """The rows of ``have`` classes that are the ``want`` ones; an error that says what to set.

    The row of a class that has none is -1.
    """
    if want == CLASSES_1K and have > want and (rows := _rows_of(have)[0]):
        return rows
    raise PretrainedError(
        f'{key}: {have} classes in the checkpoint, {want} in the model; set '
        f"MODEL.NUM_CLASSES to {have} to take the checkpoint's head, or TRAIN.RAND_INIT_FT_HEAD "
        f"to True to start from the model's own"
    )


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


def _rows() -> tuple[int, ...]:
    rows, absent = _rows_of(CLASSES_22K)
    if not rows or absent:
        raise PretrainedError(
            f'the ImageNet class lists of this timm are not the known ones: absent from '
            f'ImageNet-22K: {absent}'
        )
    return rows


@functools.cache
def _rows_of(classes: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The rows of ImageNet-1K in timm's list of so many ImageNet classes, and ids without one.

    Both are empty where timm has no such list, or one of another length. An id without a row, and
    without one that stands in for it, has row -1.
    """
    # timm takes seconds to import, and only heads of another length need it.
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({'num_classes': classes})
    if subset is None:
        return (), ()
    index = {wnid: row for row, wnid in enumerate(ImageNetInfo(subset).label_names())}
    of_1k = ImageNetInfo('imagenet-1k').label_names()
    if (len(index), len(of_1k)) != (classes, CLASSES_1K):
        return (), ()
    rows = tuple(index.get(wnid, index.get(_STAND_INS.get(wnid, ''), -1)) for wnid in of_1k)
    return rows, tuple(wnid for wnid, row in zip(of_1k, rows, strict=True) if row < 0)
