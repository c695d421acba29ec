"""Measures what building a model takes on each of two ranks: whole, and in slices for ZeRO stage 3.

    python -m tests.bench.build --params 100

The model is InternViT-6B with fewer and narrower blocks. Peak is anonymous memory beyond what the
process had before; from slices and the largest tensor follows what any size takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from internvl_ds.config.tree import default_config, set_options
from internvl_ds.train.model import build_model
from internvl_ds.zero.parameters import whole_numel
from internvl_ds.zero.sharded_build import choose_build
from tests.bench.figures import table
from tests.bench.memory import peak_growth
from tests.harness.ranks import run_ranks

HOWS = {'whole': 'never', 'in slices': 'always'}
# InternViT-6B with its linear probe: parameters, and the largest tensor (an MLP's weight).
PARAMETERS_6B, LARGEST_6B = 5_909_000_000, 3200 * 12800
_FP32 = 4  # bytes
_BLOCKS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the arguments ask for, and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--params', type=float, default=100, help='in millions')
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        print(report(measure(options.params, Path(folder))), flush=True)


def measure(millions: float, folder: Path) -> dict[str, dict[str, Any]]:
    """What rank 0 saw of a build in each way, each in processes of its own."""
    return {how: run_ranks(probe, 2, folder, millions=millions, how=how)[0] for how in HOWS}


def report(results: dict[str, dict[str, Any]], ranks_6b: int = 8) -> str:
    """A table of both ways, and what they come to at InternViT-6B on 8 ranks."""
    rows = []
    for how, result in results.items():
        sliced = how != 'whole'
        share = result['parameters'] / (2 if sliced else 1) + sliced * result['largest']
        share_6b = PARAMETERS_6B / (ranks_6b if sliced else 1) + sliced * LARGEST_6B
        rest = result['peak'] - _FP32 * share
        at_6b = _FP32 * share_6b + max(0, rest)
        rows.append(
            [how, f'{result["peak"] / 1e6:.0f}', f'{rest / 1e6:.0f}', f'{result["seconds"]:.1f}',
             f'{at_6b / 1e9:.1f}']
        )  # fmt: skip
    size = next(iter(results.values()))['parameters'] / 1e6
    titles = ['built', 'peak, MB', 'beyond slices and the largest, MB', 's']
    return f'\n{size:.0f}M parameters, 2 ranks\n' + table(
        [*titles, f'5.9 G on {ranks_6b} ranks, GB a rank'], rows
    )


def probe(millions: float, how: str) -> dict[str, Any]:
    """One build, on every rank."""
    width = 64 * max(1, round((millions * 1e6 / (12 * _BLOCKS)) ** 0.5 / 64))
    config = default_config()
    set_options(
        config,
        {
            'MODEL.TYPE': 'intern_vit_6b', 'MODEL.INTERN_VIT_6B.EMBED_DIM': width,
            'MODEL.INTERN_VIT_6B.DEPTH': _BLOCKS, 'MODEL.INTERN_VIT_6B.NUM_HEADS': width // 64,
            'TRAIN.SHARDED_BUILD': HOWS[how],
        },
    )  # fmt: skip
    models: list[nn.Module] = []

    def build() -> None:
        torch.manual_seed(0)
        sharded = choose_build(config, {'zero_optimization': {'stage': 3}})
        if sharded is None:
            models.append(build_model(config))
            return
        with sharded:
            models.append(build_model(config))
        sharded.finish(models[-1])

    small = {key: config.MODEL.INTERN_VIT_6B[key] for key in ('EMBED_DIM', 'DEPTH', 'NUM_HEADS')}
    config.MODEL.INTERN_VIT_6B.update(EMBED_DIM=64, DEPTH=1, NUM_HEADS=1)
    build()  # what is imported and connected once is not counted
    config.MODEL.INTERN_VIT_6B.update(small)
    models.clear()
    start = time.perf_counter()
    peak = peak_growth(build)
    sizes = [whole_numel(parameter) for parameter in models[0].parameters()]
    return {
        'peak': peak, 'seconds': time.perf_counter() - start,
        'parameters': sum(sizes), 'largest': max(sizes),
    }  # fmt: skip


if __name__ == '__main__':
    main()
