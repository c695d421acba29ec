"""Records which weights of a module load_pretrained took unchanged from which file.

CHECKPOINT.FROZEN 'omit' leaves such parameters out of tags. Weak: no module is kept alive.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from internvl_ds.errors import few

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The origin of one tensor.

    Attributes:
        source: the path of the file, or of the directory of files.
        keys: of the tensor in it, from the outermost mapping on.
        dtypes: that its values were cast to, one after the other, but for what it has now.
    """

    source: str
    keys: tuple[str, ...]
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Origin:
        """Reverses ``dataclasses.asdict``, from JSON."""
        return cls(said['source'], tuple(said['keys']), tuple(said['dtypes']))


_origins: weakref.WeakKeyDictionary[nn.Module, dict[str, Origin | None]] = (
    weakref.WeakKeyDictionary()
)


def note_origins(module: nn.Module, origins: Mapping[str, Origin | None]) -> None:
    """Records the origins of the tensors of these names.

    Args:
        module: that they were written into.
        origins: None for what was made out of others, such as a resized embedding.
    """
    _origins.setdefault(module, {}).update(origins)


def warn_of_unknown_origins(frozen: str, module: nn.Module) -> None:
    """Warns before training of parameters for which saves will fail.

    Args:
        frozen: CHECKPOINT.FROZEN.
        module: before there is an engine of it.
    """
    if frozen != 'omit':
        return
    known = origins_of(module)
    named = module.named_parameters()
    strange = [n for n, p in named if not p.requires_grad and n not in known]
    if strange:
        logger.warning(
            f"CHECKPOINT.FROZEN is 'omit', and load_pretrained gave no values of {few(strange)} "
            f'({len(strange)} frozen parameters): where no tag that omits them is loaded either, '
            "saves fail; 'once' saves them"
        )


def origins_of(module: nn.Module) -> dict[str, Origin | None]:
    """Name -> origin, of all tensors of a module or its parts that `note_origins` recorded."""
    return {
        f'{path}.{name}' if path else name: origin
        for path, part in module.named_modules()
        for name, origin in _origins.get(part, {}).items()
    }
