"""Measures load_pretrained: its time beside torch's own way, and its memory, plain and partitioned.

    python -m tests.bench.pretrained --params 300 --ranks 2 --rounds 9 --json figures.json

The plain module is loaded in one process, warm, in random order. Under zero.Init the slices
that the model consists of count as memory too. At 300M parameters it takes 1.2 GB of disk and 4 GB
of memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch

from internvl_ds import load_pretrained
from internvl_ds.dist.rendezvous import world_size
from tests.bench.figures import Pair, ratios_report, ratios_table, seconds_report, seconds_table
from tests.bench.harness import Contender, measure
from tests.bench.loads import highest
from tests.bench.memory import peak_growth, settled
from tests.bench.subject import Stack
from tests.harness.model import make_config
from tests.harness.ranks import run_ranks

PAIRS = (Pair('load_pretrained', 'torch.load and load_state_dict', 0.5),)
PLAIN_TARGET, PARTITIONED_TARGET = 1.02, 1.05
_TIMEOUT = 3600.0
_ROUNDS_OF_MEMORY = 3
_log = logging.getLogger('bench')


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints tables, and writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--params', type=float, default=300, help='in millions, float32')
    parser.add_argument('--ranks', type=int, default=2, help='under zero.Init')
    parser.add_argument('--rounds', type=int, default=9, help='counted samples of each way')
    parser.add_argument('--json', type=Path, help='where all samples go')
    parser.add_argument('--folder', type=Path, default=Path('/var/tmp'), help='where the file goes')
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix='bench-', dir=options.folder) as folder:
        path = Path(folder, 'weights.pth')
        torch.manual_seed(0)
        torch.save({'model': Stack(options.params).state_dict()}, path)
        common = {'path': str(path), 'millions': options.params}
        print('plain...', file=sys.stderr, flush=True)
        plain = run_ranks(
            measure_plain, 1, Path(folder), timeout=_TIMEOUT,
            rounds=options.rounds, **common,
        )[0]  # fmt: skip
        print('zero.Init...', file=sys.stderr, flush=True)
        partitioned = run_ranks(
            measure_partitioned, options.ranks, Path(folder),
            timeout=_TIMEOUT, **common,
        )[0]  # fmt: skip
    report = {'ranks': options.ranks, 'plain': plain, 'partitioned': partitioned}
    print(tables(report), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + '\n')


def tables(report: dict[str, Any]) -> str:
    """The report as markdown."""
    plain, partitioned = report['plain'], report['partitioned']
    return '\n\n'.join(
        [
            f'### {plain["parameters"] / 1e6:.1f}M parameters, a file of '
            f'{plain["file"] / 2**20:.0f} MiB',
            seconds_table(plain['seconds']),
            ratios_table(plain['ratios']),
            f'plain: private memory beyond the model / file: {plain["memory"]:.3f} '
            f'(target <= {PLAIN_TARGET:g})',
            f'zero.Init on {report["ranks"]} ranks: private memory, the model included, / (file / '
            f'ranks + twice the largest tensor): {partitioned["memory"]:.3f} '
            f'(target <= {PARTITIONED_TARGET:g})',
        ]
    )


def measure_plain(path: str, millions: float, rounds: int) -> dict[str, Any]:
    """Both ways into one plain module, and what ours needs of memory beside it."""
    model, config = Stack(millions), make_config(MODEL__PRETRAINED=path)

    def ours() -> None:
        load_pretrained(config, model, _log)

    def torchs() -> None:
        state = torch.load(path, map_location='cpu', weights_only=True)
        model.load_state_dict(state['model'])

    def warm() -> None:
        Path(path).read_bytes()

    ways = {'load_pretrained': ours, 'torch.load and load_state_dict': torchs}
    samples = measure({name: Contender(way, warm) for name, way in ways.items()}, rounds)
    size = Path(path).stat().st_size
    memory = statistics.median(peak_growth(ours) for _ in range(_ROUNDS_OF_MEMORY))
    return {
        'parameters': sum(p.numel() for p in model.parameters()),
        'file': size,
        'seconds': seconds_report(samples),
        'ratios': ratios_report(samples, PAIRS),
        'memory': memory / size,
    }


def measure_partitioned(path: str, millions: float) -> dict[str, Any]:
    """Builds under zero.Init, then loads; of the rank where most is held while loading.

    What DeepSpeed needs for a moment to build the model, and gives back, is not counted.
    """
    ds_config = {'train_micro_batch_size_per_gpu': 1, 'zero_optimization': {'stage': 3}}
    before = settled()
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = Stack(millions)
    config = make_config(MODEL__PRETRAINED=path)
    built = settled() - before
    growth = peak_growth(lambda: load_pretrained(config, model, _log))
    peak = highest(built + growth)
    largest = max(p.ds_numel for p in model.parameters()) * 4
    allowed = Path(path).stat().st_size / world_size() + 2 * largest
    return {'peak': peak, 'growth': highest(growth), 'memory': peak / allowed}


if __name__ == '__main__':
    main()
