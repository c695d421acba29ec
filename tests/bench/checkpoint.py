"""Measures saving and loading on two ranks, beside what it is to be compared with.

    python -m tests.bench.checkpoint --params 25 100 --stages 1 3 --json figures.json

A configuration is measured in one job, its contenders in random order within each round, and
compared round by round. At 100M parameters the ranks need about 12 GB of memory, the disk 12 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench import worker
from tests.bench.figures import ratios_table, seconds_table, table
from tests.harness.ranks import run_ranks

RANKS = 2
# Targets were set for models of this size; the smaller one only shows what is constant.
_TARGETS_FROM = 100
_TIMEOUT = 3600.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the arguments ask for, prints tables, and writes JSON where asked to."""
    options = _parse(arguments)
    report: dict[str, Any] = {
        'machine': {'cores': os.cpu_count(), 'kernel': platform.release()},
        'rounds': options.rounds,
        'seed': options.seed,
        'configurations': [],
    }
    for millions in options.params:
        for stage in options.stages:
            print(f'{millions:g}M parameters, ZeRO stage {stage}...', file=sys.stderr, flush=True)
            entry = measure_one(millions, stage, options)
            report['configurations'].append(entry)
            print(tables(entry), flush=True)
            if options.json:  # after each, so that a run that is ended leaves something
                options.json.write_text(json.dumps(report, indent=1) + '\n')


def measure_one(millions: float, stage: int, options: argparse.Namespace) -> dict[str, Any]:
    """Starts the ranks for one configuration and returns their report, with the targets judged."""
    with tempfile.TemporaryDirectory(prefix='bench-', dir=options.folder) as folder:
        entry = run_ranks(
            worker.measure_checkpoints,
            RANKS,
            Path(folder),
            timeout=_TIMEOUT,
            millions=millions,
            stage=stage,
            rounds=options.rounds,
            seed=options.seed,
            folder=folder,
            profile=options.profile,
            background_only=options.background_only,
        )[0]
    if millions < _TARGETS_FROM:
        for judged in (*entry['ratios'], *entry['memory'].values()):
            judged.update(target=None, verdict='')
    return entry


def tables(entry: dict[str, Any]) -> str:
    """One configuration's report as markdown."""
    title = (
        f'{entry["parameters"] / 1e6:.1f}M parameters in {entry["tensors"]} tensors, ZeRO stage '
        f'{entry["stage"]}, {entry["ranks"]} ranks, {entry["tag_bytes"] / 1e9:.2f} GB a tag'
    )
    rows = []
    for name, judged in entry['memory'].items():
        target = '' if judged['target'] is None else f'<= {judged["target"]:g}'
        rows.append((name, f'{judged["share"]:.3f}', target, judged['verdict']))
    memory = table(('extra memory / bytes read', 'median', 'target', ''), rows)
    profiles = [f'#### {name}\n\n```\n{text}```' for name, text in entry['profiles'].items()]
    parts = [seconds_table(entry['seconds']), ratios_table(entry['ratios']), memory, *profiles]
    return '\n\n'.join([f'### {title}', *parts]) + '\n'


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--params', type=float, nargs='+', default=[25, 100], help='in millions')
    parser.add_argument('--stages', type=int, nargs='+', default=[1, 3], help='ZeRO stages')
    parser.add_argument('--rounds', type=int, default=9, help='counted samples of each contender')
    parser.add_argument('--seed', type=int, default=0, help='of the order within the rounds')
    parser.add_argument('--json', type=Path, help='where all samples go')
    parser.add_argument(
        '--folder',
        type=Path,
        default=Path('/var/tmp'),
        help='on the disk to be measured; its content is removed again (default: %(default)s)',
    )
    parser.add_argument('--profile', action='store_true', help='also say where our time goes')
    parser.add_argument(
        '--background-only', action='store_true', help='no synchronous saves, and no loads'
    )
    return parser.parse_args(arguments)


if __name__ == '__main__':
    main()
