"""Measures an update of the sharded average, beside gathering everything and averaging on rank 0.

    python -m tests.bench.ema --params 100 --rounds 9 --json figures.json

Two ranks, bf16, ZeRO stage 3; the two ways in random order within each round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch

from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from tests.bench.figures import Pair, ratios_report, ratios_table, seconds_report, seconds_table
from tests.bench.harness import Contender, measure
from tests.bench.loads import highest
from tests.bench.memory import peak_growth
from tests.bench.subject import Subject
from tests.harness.ranks import run_ranks

PAIRS = (Pair('sharded', 'gather and average on rank 0', 0.2),)
MEMORY_TARGET = 1.05
_RANKS, _STAGE, _DECAY = 2, 3, 0.9998
_TIMEOUT = 3600.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints tables, and writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--params', type=float, default=100, help='in millions')
    parser.add_argument('--rounds', type=int, default=9, help='counted samples of each way')
    parser.add_argument('--json', type=Path, help='where all samples go')
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix='bench-') as folder:
        entry = run_ranks(
            measure_updates, _RANKS, Path(folder), timeout=_TIMEOUT,
            millions=options.params, rounds=options.rounds,
        )[0]  # fmt: skip
    print(tables(entry), flush=True)
    if options.json:
        options.json.write_text(json.dumps(entry, indent=1) + '\n')


def tables(entry: dict[str, Any]) -> str:
    """The report as markdown."""
    return '\n\n'.join(
        [
            f'### {entry["parameters"] / 1e6:.1f}M parameters, ZeRO stage {_STAGE}, {_RANKS} ranks',
            seconds_table(entry['seconds']),
            ratios_table(entry['ratios']),
            f'memory of the average a rank / (4 bytes x parameters / ranks): {entry["memory"]:.3f} '
            f'(target <= {MEMORY_TARGET:g})',
        ]
    )


def measure_updates(millions: float, rounds: int) -> dict[str, Any]:
    """Both ways on one engine that has taken a step."""
    subject = Subject(millions, _STAGE)
    subject.step()
    made: list[ShardedEma] = []
    growth = highest(peak_growth(lambda: made.append(ShardedEma(subject.engine, _DECAY))))
    parameters = list(subject.engine.module.parameters())
    whole = [torch.zeros(p.ds_shape) for p in parameters] if rank() == 0 else []

    def gather_and_average() -> None:
        with deepspeed.zero.GatheredParameters(parameters), torch.no_grad():
            if rank() == 0:
                torch._foreach_lerp_(whole, [p.float() for p in parameters], 1 - _DECAY)

    samples = measure(
        {
            'sharded': Contender(made[0].update),
            'gather and average on rank 0': Contender(gather_and_average),
        },
        rounds,
    )
    return {
        'parameters': subject.parameters,
        'seconds': seconds_report(samples),
        'ratios': ratios_report(samples, PAIRS),
        'memory': growth / (4 * subject.parameters / world_size()),
    }


if __name__ == '__main__':
    main()
