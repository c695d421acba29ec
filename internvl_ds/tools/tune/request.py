"""The request of a user to tune."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode


@dataclass(frozen=True)
class Request:
    """The configuration to tune, the launcher, and the limits."""

    # as for the training program, as `data_path` and `opts` are
    cfg: str
    launcher: Sequence[str]  # its words
    output: Path  # the directory of the results, and of trials to go on from
    data_path: str | None = None
    opts: Sequence[str] = ()
    ds_config: str | None = None  # that tuning starts from: a path or a shipped name; None for none
    space: Path | None = None  # a JSON file, or None for `default_space`
    # configurations to run before the finals, the given one and the shipped ones included
    trials: int = 40
    # seconds for all trials of the directory together; none is begun that would not end in them, by
    # what trials have taken so far. Up to half of them are the finals'.
    budget: float = 1800.0
    confirm: int = 3  # rounds of the finals, at most; 0 for none
    updates: int = 0  # to be timed in each trial; 0 for as many as take three seconds
    warmup: int = 3  # updates before them
    # seconds that a trial may take; 0 for four times the first one's, at least 120
    limit: float = 0.0
    ranks: int = 0  # that the launcher is expected to start; 0 to believe it
    seed: int = 0  # of the search and of the order in the finals

    def settings(self, config: CfgNode, ds_config: Any, space: Any) -> dict[str, Any]:
        """The settings on which all trials of a directory must agree, as JSON values.

        They include the yacs tree, and the contents of the ds_config and of the space's file.
        """
        return {
            '--cfg': json.loads(json.dumps(config, default=str)),
            '--deepspeed_config': ds_config,
            '--space': space,
            'launcher': list(self.launcher),
            '--updates': self.updates,
            '--warmup': self.warmup,
            '--seed': self.seed,
        }
