"""One probe, in a process of its own: ``python -m internvl_ds.tools.doctor NAME OUTPUT``.

Prints its findings as JSON and nothing else: what libraries print goes to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from internvl_ds.tools.doctor.probes import find


def main(name: str, output: Path) -> None:
    """Runs a probe and prints what it found."""
    answers = os.dup(1)
    os.dup2(2, 1)
    findings = [dataclasses.asdict(finding) for finding in find(name, output)]
    with os.fdopen(answers, 'w', encoding='utf-8') as stream:
        json.dump(findings, stream)


if __name__ == '__main__':
    main(sys.argv[1], Path(sys.argv[2]))
