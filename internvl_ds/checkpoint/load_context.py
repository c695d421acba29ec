"""A load under way: what its steps share, and how the ranks agree on each of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from yacs.config import CfgNode

from internvl_ds.checkpoint.tag.discovery import read_manifest
from internvl_ds.checkpoint.tag.manifest import Manifest
from internvl_ds.checkpoint.tag.verify import Seen, damage, share_of
from internvl_ds.config.tree import checkpoint_option
from internvl_ds.dist.group import current_group
from internvl_ds.dist.rendezvous import agree, from_rank_0, rank, world_size
from internvl_ds.errors import CheckpointError

_T = TypeVar('_T')


@dataclass(frozen=True)
class Load:
    """A load under way; see `load_checkpoint` for the arguments of the same names."""

    config: CfgNode
    logger: logging.Logger
    lr_scheduler: Any = None
    scaler: Any = None
    loop: Any = None

    @property
    def timeout(self) -> float:
        """Seconds that a rank may come late to a rendezvous."""
        return float(checkpoint_option(self.config, 'RENDEZVOUS_TIMEOUT'))

    @property
    def io_timeout(self) -> float:
        """Seconds that one rank may read longer than another."""
        return float(checkpoint_option(self.config, 'IO_TIMEOUT'))

    def from_rank_0(self, what: str, act: Callable[[], Any]) -> Any:
        """What ``act`` returns on rank 0. Collective: every rank calls it."""
        return from_rank_0(what, act, self.timeout)

    def agree(self, what: str, act: Callable[[], _T], limit: float | None = None) -> _T:
        """Runs a step; an error of any rank is one on all. Collective: every rank calls it.

        ``limit``: seconds that one rank may take longer than another; None for `io_timeout`.
        """
        return agree(what, act, self.io_timeout if limit is None else limit, CheckpointError)

    def verify(
        self, tag: Path, names_of: Callable[[Manifest], Iterable[str]], *, shared: bool
    ) -> None:
        """Compares files with their checksums, if the tag has any. Collective: every rank calls it.

        A file of any rank that is damaged is a CheckpointError on all.

        Args:
            names_of: the files; this rank's, or all.
            shared: whether each rank compares a part of them for all.
        """

        def check() -> None:
            manifest = read_manifest(tag)
            if manifest is None:
                return
            names = names_of(manifest)
            names = share_of(names, rank(), world_size()) if shared else names
            seen = current_group().part(Seen)
            damages = damage(tag, manifest, [n for n in names if not seen.take(tag, n)])
            if damages:
                raise CheckpointError('; '.join(damages))

        self.agree('verify', check)
