"""Where the files of a tag lie. Reads names only; knows no ranks."""

from __future__ import annotations

import os
from pathlib import Path

from internvl_ds.checkpoint.tag.manifest import is_shared


def place_of(tag: Path, name: str) -> Path:
    """Where a file of a tag lies: in it or, if tags share it, maybe next to it."""
    places = [tag / name]
    if is_shared(name):
        # A tag may be a link to one elsewhere.
        places += [tag.parent / name, Path(os.path.realpath(tag)).parent / name]
    return next((path for path in places if os.path.lexists(path)), places[0])
