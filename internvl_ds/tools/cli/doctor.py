"""Say what of this machine and environment would break a run: one screen.

Each line has a verdict: ``ok``; ``warning``, which may matter to some runs; or ``error``, with what
it would do to a run and what to do about it. The exit status is 0 without an error, else 1.

``--json`` prints one object: ``output``, the counts ``errors`` and ``warnings``, and ``findings``,
a list of objects with ``topic``, ``verdict``, ``found`` and ``advice`` ('' where there is none).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from internvl_ds.tools.text import json_text, say

_ERRORS = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --output and --json."""
    text = 'where checkpoints go (default: output); 256 MiB are written there, and removed'
    parser.add_argument('--output', type=Path, default=Path('output'), metavar='DIR', help=text)
    parser.add_argument('--json', action='store_true', help='print one JSON object')


def run(args: argparse.Namespace) -> int:
    """Looks at everything, says it, and returns the exit status."""
    from internvl_ds.tools.doctor.examine import examine
    from internvl_ds.tools.doctor.probe_result import ERROR
    from internvl_ds.tools.doctor.screen import screen, tree

    results = examine(args.output)
    say(json_text(tree(results, str(args.output))) if args.json else screen(results))
    return _ERRORS if any(result.verdict == ERROR for result in results) else 0
