"""DeepSpeed's monitors (TensorBoard, CSV files, ...): no training may end because of one."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from internvl_ds.config.tree import value_at
from internvl_ds.dist.rendezvous import from_rank_0
from internvl_ds.files import for_show

logger = logging.getLogger(__name__)

_WITH_FOLDER = ('tensorboard', 'csv_monitor')


def drop_unwritable_monitors(ds_config: dict[str, Any], timeout: float) -> None:
    """Turns off, with a warning, monitors whose folder rank 0 cannot write.

    Collective: every rank calls it. The resolved ``ds_config`` is changed in place.
    """
    names = [name for name in _WITH_FOLDER if value_at(ds_config, name, 'enabled')]
    if names:
        names = from_rank_0(
            'monitors', lambda: [n for n in names if not _can_write(ds_config[n])], timeout
        )
        for name in names:
            ds_config[name] = {**ds_config[name], 'enabled': False}


def guard_monitors(engine: DeepSpeedEngine) -> None:
    """Makes the first failure to write events a warning, and ignores the next ones."""
    write = engine.monitor.write_events

    def write_events(events: Any) -> None:
        with for_show("the events of the ds_config's monitors", logger):
            write(events)

    engine.monitor.write_events = write_events


def _can_write(section: dict[str, Any]) -> bool:
    folder = Path(section.get('output_path') or '', section.get('job_name', 'DeepSpeedJobName'))
    with for_show(folder, logger):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return True
    return False  # `for_show` has logged the failure
