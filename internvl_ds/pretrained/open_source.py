"""Opens what MODEL.PRETRAINED names, as the settings beside it say."""

from __future__ import annotations

import os
from pathlib import Path

from yacs.config import CfgNode

from internvl_ds.checkpoint.sources.open_weights import averaged_in, open_weights
from internvl_ds.checkpoint.tag.discovery import is_tag, read_manifest
from internvl_ds.checkpoint.tag.verify import damage, share_of, weight_files
from internvl_ds.config.tree import get_option
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.errors import PretrainedError
from internvl_ds.files.reading import interpreting
from internvl_ds.pretrained.transforms import State


def open_source(config: CfgNode, path: str) -> tuple[State, tuple[str, ...]]:
    """Opens weights; with MODEL.PRETRAINED_EMA the averaged ones. Reads files; no collective.

    Returns:
        The state, and the keys under which it lies in the file: () where it is all of it.

    Raises:
        PretrainedError: for what cannot be read, a damaged tag, and settings that contradict.
    """
    _verify_share(path)
    averaged = bool(get_option(config, 'MODEL.PRETRAINED_EMA', False))
    if averaged and get_option(config, 'MODEL.PRETRAINED_KEY', ''):
        raise PretrainedError('MODEL.PRETRAINED_KEY and PRETRAINED_EMA are set: set one of them')
    with interpreting(path, PretrainedError):
        if not averaged or os.path.isdir(path):
            return open_weights(path, ema=averaged), ()
        entry, source = averaged_in(open_weights(path), path)
        return source, (entry,)


def _verify_share(path: str) -> None:
    """Compares this rank's share of a tag's files with their checksums; other sources have none."""
    if not (Path(path).is_dir() and is_tag(Path(path))):
        return
    manifest = read_manifest(Path(path))
    if manifest is None:
        return
    names = [*weight_files(manifest), *(name for name in manifest.files if name.startswith('ema'))]
    damages = damage(Path(path), manifest, share_of(names, rank(), world_size()))
    if damages:
        raise PretrainedError('; '.join(damages))
