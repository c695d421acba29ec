"""What ranks do in test_port.py: they run one of the two scripts with several settings in turn."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from internvl_ds.dist.rendezvous import rank
from internvl_ds.engine import registry


def run_script(script: str, jobs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs a script for each job in this process; what this rank has recorded of each.

    Args:
        script: 'plain' or 'ported'.
        jobs: ``arguments`` of the command line, with --output; ``ds_config`` a path or a name;
            ``kill`` where each rank kills itself, as 'epoch:idx'.
    """
    module: Any = importlib.import_module(f'tests.whole.port.{script}')
    module.shutdown = lambda: None  # the process has more to run
    found = []
    for job in jobs:
        os.environ.update(DS_CONFIG=job['ds_config'], PORT_KILL=job.get('kill', ''))
        module.start(job['arguments'])
        for engine in list(registry._registrations):
            engine.destroy()
        arguments = job['arguments']
        output = arguments[arguments.index('--output') + 1]
        found.append(records(Path(output) / 'port', rank()))
    return found


def records(output: Path, own: int) -> list[dict[str, Any]]:
    """What a rank has recorded in an output directory."""
    lines = (output / f'record_{own}.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]
