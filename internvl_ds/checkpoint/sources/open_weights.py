"""Weights from wherever MODEL.PRETRAINED may point: a file, a directory, a tag, an address."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_ds.checkpoint.formats.ema_files import EmaFiles, ema_flats
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.sources import downloads
from internvl_ds.checkpoint.sources.weight_files import open_file
from internvl_ds.checkpoint.tag.discovery import is_tag
from internvl_ds.errors import CheckpointError, PretrainedError, few
from internvl_ds.files.addresses import is_address

# Averaged weights in files of the original and of timm, and of others.
AVERAGES = ('model_ema', 'state_dict_ema', 'ema_state_dict', 'ema')
_log = logging.getLogger(__name__)


def open_weights(path: str, *, ema: bool = False) -> Mapping[str, Any]:
    """Opens weights as `open_file` does; of a tag as `Flat` values, read when they are used.

    Args:
        path: as `open_file` takes it; or a tag of this package or of DeepSpeed; or an address, as
            `downloads.fetch` takes it.
        ema: take the averaged weights: of a tag, or of a file those that `averaged_in` finds.
    """
    if not path:
        raise PretrainedError('the path of the weights is empty')
    if is_address(path):
        path = str(downloads.fetch(path))
    if os.path.isdir(path) and is_tag(Path(path)):
        return _open_tag(Path(path), ema)
    if ema and os.path.isdir(path):
        raise PretrainedError(f'{path}: holds no averaged weights: it is no tag directory')
    source = open_file(path)
    return averaged_in(source, path)[1] if ema else source


def averaged_in(source: Mapping[str, Any], path: str) -> tuple[str, Mapping[str, Any]]:
    """The entry of an opened file that holds averaged weights, and what is in it.

    Raises:
        PretrainedError: naming the path, where there is none.
    """
    name = next((n for n in AVERAGES if isinstance(source.get(n), Mapping)), None)
    if name is None:
        raise PretrainedError(f'{path}: holds no averaged weights (no {few(AVERAGES)} in it)')
    return name, source[name]


def _open_tag(path: Path, ema: bool) -> Mapping[str, Any]:
    try:
        if not ema:
            shards = TagShards(path)
            if shards.unused:
                _log.warning(f'{path}: files of another layout are not read: {few(shards.unused)}')
            return shards.named_weights()
        files = EmaFiles(path)
        if not files:
            raise PretrainedError(f'{path}: holds no averaged weights')
        return ema_flats(files)
    except CheckpointError as error:
        raise PretrainedError(str(error)) from error
