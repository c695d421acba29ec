"""Measures loading a tag into another world size, beside DeepSpeed's conversion and load.

    python -m tests.bench.elastic --params 100 --rounds 5 --json figures.json

A stage-2 tag of two ranks goes into one, and one of one rank into two; the two ways in random order
within each round, all in one job. At 100M parameters it takes 15 GB of disk and 10 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_ds.dist.rendezvous import rank
from tests.bench.figures import Pair, ratios_report, ratios_table, seconds_report, seconds_table
from tests.bench.harness import Contender, barrier, measure
from tests.bench.loads import highest
from tests.bench.memory import anonymous, peak_growth
from tests.bench.subject import Subject
from tests.harness.ranks import run_ranks

STAGE = 2
PAIRS = (Pair('ours', 'convert and load', 0.2), Pair('ours', 'same layout'))
MEMORY_TARGET = 1.3
_TIMEOUT = 3600.0
_UNIVERSAL = {'universal_checkpoint_info': {'universal_checkpoint_version': 0.2}}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures both directions, prints tables, and writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--params', type=float, default=100, help='in millions')
    parser.add_argument('--rounds', type=int, default=5, help='counted samples of each way')
    parser.add_argument('--json', type=Path, help='where all samples go')
    parser.add_argument('--folder', type=Path, default=Path('/var/tmp'), help='on the disk to use')
    options = parser.parse_args(arguments)
    report = []
    for source, target in ((2, 1), (1, 2)):
        print(f'{source} -> {target} ranks...', file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix='bench-', dir=options.folder) as folder:
            entry = move(options.params, source, target, options.rounds, Path(folder))
        report.append(entry)
        print(tables(entry), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + '\n')


def move(millions: float, source: int, target: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Saves on ``source`` ranks and measures the loads on ``target`` ranks."""
    arguments = {'millions': millions, 'folder': str(folder)}
    run_ranks(save_tags, source, folder, timeout=_TIMEOUT, **arguments)
    entry = run_ranks(
        measure_loads, target, folder, timeout=_TIMEOUT,
        rounds=rounds, **arguments,
    )[0]  # fmt: skip
    return {'source': source, 'target': target, **entry}


def tables(entry: dict[str, Any]) -> str:
    """One direction's report as markdown."""
    memory = entry['memory']
    return '\n\n'.join(
        [
            f'### {entry["parameters"] / 1e6:.1f}M parameters, ZeRO stage {STAGE}, '
            f'{entry["source"]} -> {entry["target"]} ranks',
            seconds_table(entry['seconds']),
            ratios_table(entry['ratios']),
            f'peak private memory of ours / of a load in the same layout: {memory:.2f} '
            f'(target <= {MEMORY_TARGET:g})',
        ]
    )


def save_tags(millions: float, folder: str) -> None:
    """The same state twice: a tag of ours, and one that DeepSpeed can convert."""
    subject = Subject(millions, STAGE)
    subject.step()
    subject.save(Path(folder, 'ours'))
    subject.save_plain(Path(folder, 'plain'), 'tag', _UNIVERSAL)


def measure_loads(millions: float, folder: str, rounds: int) -> dict[str, Any]:
    """Both ways into one engine, which has optimizer state of its own already."""
    root = Path(folder)
    subject = Subject(millions, STAGE)
    subject.step()
    same = subject.save(root / 'same')
    ours = root / 'ours' / 'ckpt_epoch_0'
    converted = root / 'universal'

    def convert_and_load() -> None:
        if rank() == 0:
            command = [
                sys.executable, '-m', 'deepspeed.checkpoint.ds_to_universal',
                '--input_folder', str(root / 'plain' / 'tag'), '--output_folder', str(converted),
            ]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True)
        barrier()
        subject.load_universal(converted)

    def clear() -> None:
        if rank() == 0:
            shutil.rmtree(converted, ignore_errors=True)
        for path in (*ours.glob('*_states.pt'), *(root / 'plain' / 'tag').glob('*_states.pt')):
            path.read_bytes()  # warm
        barrier()

    samples = measure(
        {
            'ours': Contender(lambda: subject.load(ours), clear),
            'convert and load': Contender(convert_and_load, clear),
            'same layout': Contender(lambda: subject.load(same), clear),
        },
        rounds,
    )
    peaks = {}
    for name, tag in (('ours', ours), ('same', same)):
        seen = []
        for _ in range(3):
            before = anonymous()
            seen.append(highest(before + peak_growth(lambda t=tag: subject.load(t))))
        peaks[name] = statistics.median(seen)
    return {
        'parameters': subject.parameters,
        'seconds': seconds_report(samples),
        'ratios': ratios_report(samples, PAIRS),
        'memory': peaks['ours'] / peaks['same'],
    }


if __name__ == '__main__':
    main()
