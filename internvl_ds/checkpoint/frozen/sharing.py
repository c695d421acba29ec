"""One rank's save with CHECKPOINT.FROZEN 'once': the frozen parameters are written if they changed.

Their digest is taken at every save. What has it already, in this output directory, gets one more
name (a hard link), or stays the one file next to the tags where the file system has no links.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from internvl_ds.checkpoint.frozen import frozen_bytes
from internvl_ds.checkpoint.frozen.frozen_file import FrozenFile
from internvl_ds.checkpoint.frozen.model_file import KEY, split
from internvl_ds.checkpoint.tag.hashing import hash_file
from internvl_ds.checkpoint.tag.manifest import FileEntry, shared_name
from internvl_ds.checkpoint.tag.shared import NO_LINK, holders
from internvl_ds.checkpoint.tag.trash import MARK
from internvl_ds.config.choices import frozen_of
from internvl_ds.dist.rendezvous import rank
from internvl_ds.zero.module_state import tied_names
from internvl_ds.zero.parameters import is_sharded, whole_numel
from internvl_ds.zero.wrapper import Wrapper

logger = logging.getLogger(__name__)

MODEL_FILE = '_model_states.pt'
# Bytes of frozen parameters that are kept apart unasked.
_WORTH_IT = 64 << 20

# Of files whose content was compared: device, inode, size, time of the last write.
Seen = set[tuple[int, int, int, int]]


@dataclass
class Sharing:
    """How a save of this rank keeps the frozen parameters apart.

    Attributes:
        output, staging: the directory of tags, and what the save writes into.
        frozen: names of the parameters that the optimizer does not train.
        aliases: every further name of a tied parameter -> its first.
        sharded: whether each rank has a slice of them (stage 3).
        seen: what earlier saves of this process have compared.
        files: name -> size and digest of the shared file that this tag has; at most one.
    """

    output: Path
    staging: Path
    frozen: frozenset[str]
    aliases: dict[str, str]
    sharded: bool
    seen: Seen
    files: dict[str, FileEntry] = field(default_factory=dict)

    @property
    def header(self) -> dict[str, str]:
        """The manifest's entry: `Header.frozen`."""
        return {'kept': 'once', 'output': str(self.output)} if self.files else {}

    def parts(self, state: Any, path: Path) -> list[tuple[Path, Any]]:
        """What is to be written for a file of DeepSpeed's: place and content of one or two."""
        if not path.name.endswith(MODEL_FILE):
            return [(path, state)]
        left, tensors = split(state, self.frozen, self.aliases, sharded=self.sharded)
        if not tensors:
            return [(path, state)]
        entry = frozen_bytes.entry_of(tensors)
        name = shared_name(rank(), entry.digest)
        left[KEY] |= {'file': name, 'output': str(self.output)}
        self.files[name] = entry
        if self._take(name, entry):
            return [(path, left)]
        folder = self.staging if self.has_links() else self.output
        return [(path, left), (folder / name, FrozenFile(entry, tensors))]

    def _take(self, name: str, entry: FileEntry) -> bool:
        """Links an existing shared file into the tag; False if there is no whole one."""
        for path in holders(self.output, name):
            try:
                if not self._is_whole(path, entry):
                    continue
            except OSError:  # it has gone, or is not for this user to read
                continue
            try:
                os.link(path, self.staging / name)
                return True
            except OSError as error:
                if error.errno in NO_LINK and path.parent == self.output:
                    return True
        return False

    def _is_whole(self, path: Path, entry: FileEntry) -> bool:
        status = path.stat()
        known = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if known not in self.seen:
            if hash_file(path, entry.size) != entry:
                logger.warning('%s: damaged; the frozen parameters are written anew', path)
                return False
            self.seen.add(known)
        return True

    def has_links(self) -> bool:
        """Whether the file system gives a file several names."""
        probe = self.staging / f'.link-{rank()}'
        try:
            os.link(self.staging / MARK, probe)
            probe.unlink()
        except OSError:
            return False
        return True


def sharing(wrapper: Wrapper, output: Path, staging: Path, seen: Seen) -> Sharing:
    """For a save of this engine; see `Sharing`."""
    module = wrapper.engine.module
    return Sharing(
        output, staging, frozen_names(wrapper), tied_names(module), wrapper.sharded, seen
    )


def frozen_names(wrapper: Wrapper) -> frozenset[str]:
    """The parameters that the optimizer does not train, without further names of tied ones."""
    trained, client = wrapper.trained_names(), wrapper.client
    # A torch optimizer's groups may hold frozen parameters, of which it keeps no state.
    plain = client is not None and not (wrapper.partitioned or wrapper.separate_masters)
    return frozenset(
        name
        for name, parameter in wrapper.engine.module.named_parameters()
        if name not in trained
        or (plain and not parameter.requires_grad and not client.state.get(parameter))
    )


def frozen_mode(wrapper: Wrapper, config: CfgNode) -> str:
    """CHECKPOINT.FROZEN; for 'auto' the mode that it means for this engine, on all ranks."""
    mode = frozen_of(config)
    if mode != 'auto':
        return mode
    frozen, named = frozen_names(wrapper), list(wrapper.engine.module.named_parameters())
    apart = [p for name, p in named if name in frozen]
    count, size = sum(map(whole_numel, apart)), sum(whole_numel(p) * p.itemsize for p in apart)
    is_most = 2 * count > sum(whole_numel(p) for _, p in named)
    return 'once' if is_most and size >= _WORTH_IT else 'keep'


def apart_from(wrapper: Wrapper, config: CfgNode) -> dict[str, torch.Tensor]:
    """The whole parameters kept apart from a tag; none at stage 3, which keeps slices."""
    if frozen_mode(wrapper, config) == 'keep':
        return {}
    frozen, named = frozen_names(wrapper), wrapper.engine.module.named_parameters()
    return {n: p.detach() for n, p in named if n in frozen and not is_sharded(p)}
