"""Measures updates of AdamW on the host: DeepSpeed's vectorised one beside torch's.

    python -m tests.bench.adam --params 100 --threads 2 --rounds 9

One flat fp32 tensor, as ZeRO with offload gives to a rank; the two in random order within each
round, so that samples of a round are pairs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from tests.bench.figures import paired_ratios, summary
from tests.bench.harness import ROUNDS, Contender, measure

_WAYS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    'DeepSpeedCPUAdam': DeepSpeedCPUAdam,
    'torch AdamW': torch.optim.AdamW,
    'torch AdamW, fused': lambda parameters: torch.optim.AdamW(parameters, fused=True),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints a line for each way."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--params', type=float, default=100, help='in millions')
    parser.add_argument('--threads', type=int, default=2, help='of torch and of OpenMP')
    parser.add_argument('--rounds', type=int, default=ROUNDS, help='pairs')
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    parameter = nn.Parameter(torch.ones(int(options.params * 1e6)))
    parameter.grad = torch.full_like(parameter, 1e-3)
    contenders = {name: Contender(make([parameter]).step) for name, make in _WAYS.items()}
    samples = measure(contenders, options.rounds)
    ours = samples['DeepSpeedCPUAdam']
    print(f'{options.params:g}M parameters, {options.threads} threads, {options.rounds} pairs')
    for name, seconds in samples.items():
        rates, ratios = summary([1 / each for each in seconds]), paired_ratios(seconds, ours)
        print(
            f'{name:20} {rates.median:8.3g} [{rates.min:.3g}-{rates.max:.3g}] updates/s; '
            f"seconds / DeepSpeedCPUAdam's {statistics.median(ratios):.2f} "
            f'[{min(ratios):.2f}-{max(ratios):.2f}]'
        )


if __name__ == '__main__':
    main()
