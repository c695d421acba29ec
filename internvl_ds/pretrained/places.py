"""The places in a file of the values that are written into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from internvl_ds.checkpoint.tag.discovery import is_tag
from internvl_ds.pretrained.transforms import State
from internvl_ds.zero.origins import Origin


def origins_in(
    path: str, source: State, state: State, model: nn.Module, *, ema: bool = False
) -> dict[str, Origin | None]:
    """For each written value its place in the file, if it stands there unchanged.

    Args:
        path: that ``source`` was opened from; a tag is none to come from, as retention removes it.
        source: as opened, before any step.
        state: key of the model -> value.
        model: that it is written into.
        ema: whether ``source`` is what the file has under model_ema.
    """
    if Path(path).is_dir() and is_tag(Path(path)):
        return {}
    front = ('model_ema',) if ema else ()
    inner = {name: value for name, value in source.items() if isinstance(value, Mapping)}
    places = {id(v): (*front, n, k) for n, part in inner.items() for k, v in part.items()}
    places |= {id(value): (*front, name) for name, value in source.items()}
    # A detached parameter would be gathered, in a model that is being built in slices.
    kept = model.state_dict(keep_vars=True)
    dtypes = {name: str(tensor.dtype).removeprefix('torch.') for name, tensor in kept.items()}
    where = os.path.abspath(path)
    return {
        key: Origin(where, place, (dtypes[key],)) if (place := places.get(id(value))) else None
        for key, value in state.items()
    }
