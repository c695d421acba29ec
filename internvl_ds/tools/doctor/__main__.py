"""One probe, in a process of its own: ``python -m internvl_ds.tools.doctor NAME OUTPUT``.

Prints its results as JSON and nothing else: what libraries print goes to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from internvl_ds.tools.doctor.probes import run_probe


def main(name: str, output: Path) -> None:
    """Runs a probe and prints its results."""
    answers = os.dup(1)
    os.dup2(2, 1)
    results = [dataclasses.asdict(result) for result in run_probe(name, output)]
    with os.fdopen(answers, 'w', encoding='utf-8') as stream:
        json.dump(results, stream)


if __name__ == '__main__':
    main(sys.argv[1], Path(sys.argv[2]))
