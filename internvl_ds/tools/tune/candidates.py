"""A configuration to try, and when two of them are the same one."""

from __future__ import annotations

import functools
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash
from yacs.config import CfgNode

from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.ds.load import load_ds_config
from internvl_ds.config.ds.pairs import ACCUMULATION, MICRO_BATCH
from internvl_ds.config.tree import get_config, get_option
from internvl_ds.tools.tune.command import opt_words
from internvl_ds.tools.tune.records import BASE, SEARCH, SHIPPED
from internvl_ds.tools.tune.search_space import Labels, SearchSpace, batch_choice, merged

# Those that ship and differ in more than the precision, which tuning leaves as it is.
_SHIPPED = (
    'zero0', 'zero1', 'zero2', 'zero3', 'zero2_offload', 'zero3_offload_optimizer', 'zero3_offload',
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A configuration, whole."""

    kind: str  # where it is from: BASE, SHIPPED or SEARCH of `records`
    name: str  # for people
    ds_config: Mapping[str, Any]  # what the training program is given
    opts: Mapping[str, Any]  # further yacs settings that it is given
    config: CfgNode  # the yacs tree that it trains with
    # the ds_config that it trains with; empty where it is not known how many ranks do
    resolved: Mapping[str, Any]
    labels: Labels = field(default_factory=dict)  # of the search's proposal

    @property
    def key(self) -> str:
        """A key that is equal for configurations of the same effective settings."""
        # A section that is only switched off means what its absence does.
        tree = {key: value for key, value in self.resolved.items() if value != {'enabled': False}}
        text = json.dumps(tree, sort_keys=True) + self.config.dump()
        return xxhash.xxh3_64_hexdigest(text.encode())


def name_of(labels: Labels) -> str:
    """Labels for people."""
    return ' '.join(f'{axis}={label}' for axis, label in labels.items())


@dataclass(frozen=True)
class Subject:
    """The user's configuration, which is tuned."""

    # as for the training program, as `data_path` and `opts` are
    cfg: str
    data_path: str | None
    opts: Sequence[str]
    ds_config: Mapping[str, Any]  # that tuning starts from
    ranks: int  # how many train; 0 while that is not known, and only `base` can be had

    def configured(self, more: Mapping[str, Any] | None = None) -> CfgNode:
        """The yacs tree, with further settings."""
        words = [*self.opts, *opt_words(more or {})]
        return get_config(Namespace(cfg=self.cfg, opts=words, data_path=self.data_path))

    @functools.cached_property
    def base(self) -> Candidate:
        """The configuration as it was given."""
        return self._settle(BASE, 'as configured', self.ds_config, {})

    @functools.cached_property
    def shipped(self) -> list[Candidate]:
        """The ds_configs that ship, with the batch that is configured."""
        batch = batch_choice(*self._batch_numbers())
        trees = {name: merged(load_ds_config(name), batch.ds_config) for name in _SHIPPED}
        return [self._settle(SHIPPED, name, tree, batch.opts) for name, tree in trees.items()]

    def proposal(self, space: SearchSpace, labels: Labels) -> Candidate:
        """The configuration that labels stand for.

        Raises:
            ConfigError: where their pieces contradict each other.
        """
        batch = batch_choice(*self._batch_numbers())
        ds_config, opts = space.build(merged(self.ds_config, batch.ds_config), labels)
        opts = {**batch.opts, **opts}
        return self._settle(SEARCH, name_of(labels), ds_config, opts, labels)

    def images(self) -> int:
        """Images of one rank in one update."""
        micro, accumulation = self._batch_numbers()
        return micro * accumulation

    def differing(self, candidate: Candidate) -> dict[str, Any]:
        """The settings of a candidate that the configuration as given does not have already."""
        config = self.configured()
        alike = {ACCUMULATION.yacs: {*ACCUMULATION.alike}}
        return {
            key: value
            for key, value in candidate.opts.items()
            if value != (configured := get_option(config, key, None))
            and not (key in alike and {value, configured} <= alike[key])
        }

    def _batch_numbers(self) -> tuple[int, int]:
        resolved = self.base.resolved
        return resolved[MICRO_BATCH.key], resolved[ACCUMULATION.key]

    def _settle(
        self, kind: str, name: str, ds_config: Mapping, opts: Mapping, labels: Labels | None = None
    ) -> Candidate:
        config = self.configured(opts)
        resolved: dict[str, Any] = {}
        if self.ranks:
            resolved = ds.resolve_or_raise(ds_config, config, self.ranks)
            ds.adopt(config, resolved)
        return Candidate(kind, name, ds_config, opts, config, resolved, labels or {})
