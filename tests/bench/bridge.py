"""Measures an update through the scaler bridge, beside a bare loop on the same engine.

    python -m tests.bench.bridge --model vit_small_patch16_224 --batch 4 --steps 2 --rounds 9
    python -m tests.bench.bridge --gpu --model vit_base_patch16_224 --batch 128 --steps 20

The bare loop is ``engine(x)``, ``engine.backward``, ``engine.step`` and
``engine.get_global_grad_norm()``, clipping by the ds_config. Both run in one process on one model,
in random order within each round.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from internvl_ds import NativeScalerWithGradNormCount, initialize
from internvl_ds.dist.rendezvous import rank
from tests.bench.figures import Pair, ratios_report, ratios_table, seconds_report, seconds_table
from tests.bench.harness import Contender, measure
from tests.harness.model import make_config, make_optimizer, module_dtype, precision_values
from tests.harness.ranks import run_ranks

PAIRS = (Pair('bridge', 'bare engine', 1.01),)
_CLIP = 5.0
_CLASSES = 1000
_TIMEOUT = 3600.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every stage and precision asked for, prints tables, writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--model', default='vit_small_patch16_224', help="timm's name")
    parser.add_argument('--batch', type=int, default=4, help='images a rank and update')
    parser.add_argument('--steps', type=int, default=2, help='updates a sample')
    parser.add_argument('--rounds', type=int, default=9, help='counted samples of each')
    parser.add_argument('--ranks', type=int, default=1)
    parser.add_argument('--stages', type=int, nargs='+', default=[0, 1, 2, 3])
    parser.add_argument('--precisions', nargs='+', default=['bf16'])
    parser.add_argument('--gpu', action='store_true', help='one GPU a rank; otherwise the CPU')
    parser.add_argument('--json', type=Path, help='where all samples go')
    options = parser.parse_args(arguments)
    visible = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(options.ranks))))
    env = {'DS_ACCELERATOR': 'cuda', 'CUDA_VISIBLE_DEVICES': visible} if options.gpu else None
    report = []
    for precision in options.precisions:
        for stage in options.stages:
            print(f'{precision}, ZeRO stage {stage}...', file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix='bench-') as folder:
                entry = run_ranks(
                    measure_updates, options.ranks, Path(folder),
                    timeout=_TIMEOUT, env=env, model=options.model, batch=options.batch,
                    steps=options.steps, rounds=options.rounds, stage=stage, precision=precision,
                )[0]  # fmt: skip
            report.append(entry)
            print(tables(entry), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + '\n')


def tables(entry: dict[str, Any]) -> str:
    """One configuration's report as markdown."""
    return '\n\n'.join(
        [
            f'### {entry["model"]}, batch {entry["batch"]}, {entry["precision"]}, ZeRO stage '
            f'{entry["stage"]}, {entry["steps"]} updates a sample on {entry["device"]}',
            seconds_table(entry['seconds']),
            ratios_table(entry['ratios']),
        ]
    )


def measure_updates(
    model: str, batch: int, steps: int, rounds: int, stage: int, precision: str
) -> dict[str, Any]:
    """Both loops on one engine. Every rank calls it."""
    torch.manual_seed(0)
    net = timm.create_model(model, num_classes=_CLASSES)
    config = make_config(
        DATA__BATCH_SIZE=batch, TRAIN__CLIP_GRAD=_CLIP, **precision_values(precision)
    )
    engine, optimizer = initialize(
        config, net, make_optimizer(net, 1e-5), {'zero_optimization': {'stage': stage}}
    )
    scaler = NativeScalerWithGradNormCount()
    generator = torch.Generator().manual_seed(rank())
    size = net.default_cfg['input_size']
    x = torch.randn(batch, *size, generator=generator).to(engine.device, module_dtype(precision))
    y = torch.randint(_CLASSES, (batch,), generator=generator).to(engine.device)

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(engine(x).float(), y)

    def bridge() -> None:
        for _ in range(steps):
            scaler(loss(), optimizer, _CLIP)
        get_accelerator().synchronize()

    def bare() -> None:
        for _ in range(steps):
            engine.set_gradient_accumulation_boundary(True)
            engine.backward(loss(), scale_wrt_gas=False)
            engine.step()
            engine.get_global_grad_norm()
        get_accelerator().synchronize()

    samples = measure({'bridge': Contender(bridge), 'bare engine': Contender(bare)}, rounds)
    return {
        'model': model, 'batch': batch, 'steps': steps, 'stage': stage, 'precision': precision,
        'device': get_accelerator().device_name(),
        'seconds': seconds_report(samples),
        'ratios': ratios_report(samples, PAIRS),
    }  # fmt: skip


if __name__ == '__main__':
    main()
