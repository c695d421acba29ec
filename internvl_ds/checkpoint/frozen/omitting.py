"""One rank's save with CHECKPOINT.FROZEN 'omit': frozen parameters stay in the file they came from.

Nothing is left out that is not there bit for bit: the first save compares all of it with the file,
the next ones its digest in memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from internvl_ds.checkpoint.frozen.frozen_bytes import entry_of
from internvl_ds.checkpoint.frozen.model_file import KEY, split
from internvl_ds.checkpoint.frozen.sharing import MODEL_FILE, frozen_names
from internvl_ds.checkpoint.frozen.sources import Omitted, pieces_of
from internvl_ds.checkpoint.sources.weight_files import open_file
from internvl_ds.checkpoint.tag.manifest import FileEntry
from internvl_ds.errors import CheckpointError, InternvlDsError, few
from internvl_ds.zero.module_state import tied_names
from internvl_ds.zero.origins import Origin, note_origins, origins_of
from internvl_ds.zero.parameters import is_sharded, own_slice, whole_shape
from internvl_ds.zero.wrapper import Wrapper

_ELSE = "set CHECKPOINT.FROZEN to 'once', which writes them once"

# Digest in memory of what was compared, and the sources as they were then -> their digests.
Compared = dict[tuple[str, tuple[Any, ...]], dict[str, str]]


@dataclass
class Omitting:
    """How a save of this rank omits frozen parameters; see `Sharing`, which has the same parts.

    Attributes:
        module: the engine's.
        frozen: names of the parameters that the optimizer does not train.
        compared: what earlier saves of this process have compared.
        files: no shared file.
        header: for the manifest.
    """

    module: nn.Module
    frozen: frozenset[str]
    sharded: bool
    compared: Compared
    files: dict[str, FileEntry] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)

    def parts(self, state: Any, path: Path) -> list[tuple[Path, Any]]:
        """What is to be written for a file of DeepSpeed's.

        Raises:
            CheckpointError: for a frozen parameter that is not as load_pretrained gave it.
        """
        if not path.name.endswith(MODEL_FILE) or not self.frozen:
            return [(path, state)]
        origins = self._origins()
        left, tensors = split(state, set(origins), tied_names(self.module), sharded=self.sharded)
        named = dict(self.module.named_parameters())
        omitted = {name: _omitted(named[name], t, origins[name]) for name, t in tensors.items()}
        sources = sorted({origin.source for origin in origins.values()})
        known = (entry_of(tensors).digest, tuple(map(_stamp, sources)))
        if known not in self.compared:
            self.compared.clear()
            self.compared[known] = _require_same(sources, omitted, tensors)
        digests = self.compared[known]
        left[KEY] |= {'omitted': {n: o.to_list() for n, o in omitted.items()}, 'digests': digests}
        self.header = {'kept': 'omit', 'sources': ', '.join(digests)}
        return [(path, left)]

    def _origins(self) -> dict[str, Origin]:
        """The origins of the frozen parameters that a file holds unchanged.

        What load_pretrained made out of others (a resized embedding) is left to the tag.
        """
        known = origins_of(self.module)
        found = {n: o for n in self.frozen if (o := known.get(n)) is not None}
        strange = [name for name in self.frozen if name not in known]
        if strange or not found:
            raise CheckpointError(
                f"CHECKPOINT.FROZEN is 'omit', and {few(sorted(strange or self.frozen))} "
                f'({len(strange or self.frozen)} frozen parameters) came from no file by '
                f'load_pretrained, as they are there: {_ELSE}'
            )
        return found


def omitting(wrapper: Wrapper, compared: Compared) -> Omitting:
    """For a save of this engine; see `Omitting`."""
    return Omitting(wrapper.engine.module, frozen_names(wrapper), wrapper.sharded, compared)


def adopt_origins(module: nn.Module, head: Mapping[str, Any]) -> None:
    """Records where the omitted parameters of a loaded tag came from: this run omits them too.

    Args:
        module: that the tag was loaded into.
        head: the tag's model states, as a reader gives them.
    """
    apart = head.get(KEY) or {}
    known = {}
    for name, said in apart.get('omitted', {}).items():
        one = Omitted.of(said)
        origin, place = one.origin, apart['places'][one.origin.source]
        known[name] = Origin(place, origin.keys, (*origin.dtypes, one.dtype))
    kept = [name for name in head['module'] if known and name not in known]
    note_origins(module, {**dict.fromkeys(kept), **known})


def _omitted(parameter: Any, tensor: torch.Tensor, origin: Origin) -> Omitted:
    shape = list(whole_shape(parameter))
    start, stop = own_slice(parameter) if is_sharded(parameter) else (0, tensor.numel())
    dtype = str(tensor.dtype).removeprefix('torch.')
    return Omitted(origin, dtype, shape, start, stop, tensor.numel())


def _stamp(source: str) -> tuple[Any, ...]:
    """Changes when a file, or one in a directory of files, is written."""
    names = sorted(os.listdir(source)) if os.path.isdir(source) else ['']
    found = [os.stat(os.path.join(source, name) if name else source) for name in names]
    return (source, *((status.st_ino, status.st_size, status.st_mtime_ns) for status in found))


def _require_same(
    sources: list[str], omitted: Mapping[str, Omitted], tensors: Mapping[str, torch.Tensor]
) -> dict[str, str]:
    """The digest of each source's tensors; raises if they do not give all omitted values again."""
    digests = {}
    for source in sources:
        own = {name: one for name, one in omitted.items() if one.origin.source == source}
        try:
            pieces = pieces_of(open_file(source), own)
            digests[source] = entry_of(pieces).digest
        except (InternvlDsError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"CHECKPOINT.FROZEN is 'omit', and {source} does not hold what was loaded from it "
                f'any more ({error}): {_ELSE}'
            ) from error
        changed = [n for n, one in own.items() if not _equal(one.made_of(pieces[n]), tensors[n])]
        if changed:
            raise CheckpointError(
                f"CHECKPOINT.FROZEN is 'omit', and {few(changed)} ({len(changed)} frozen "
                f'parameters) are not as load_pretrained took them from {source}: {_ELSE}'
            )
    return digests


def _equal(made: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Compares bit for bit; a slice may be longer, by padding."""
    own = tensor.reshape(-1)[: made.numel()].cpu().contiguous()
    made = made.reshape(-1).contiguous()
    return own.dtype == made.dtype and torch.equal(own.view(torch.uint8), made.view(torch.uint8))
