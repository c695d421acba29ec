"""Measures training with TRAIN.COMPILE beside training without: images a second of one rank.

    python -m tests.bench.compiled --model vit_tiny_patch16_224 --img 96 --batch 16 --rounds 9

One engine of each kind, the same weights and images; the two in random order within each round, so
that samples of a round are pairs. The first updates, which compile, are not measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import timm
import torch
from torch.nn.functional import cross_entropy

from internvl_ds import NativeScalerWithGradNormCount, initialize
from internvl_ds.config.tree import default_config
from tests.bench.figures import paired_ratios, summary
from tests.bench.harness import ROUNDS, Contender, measure
from tests.harness.model import on_device


def make(options: argparse.Namespace, backend: str) -> Callable[[], None]:
    """Makes an engine; returns a call that takes some updates."""
    config = default_config()
    config.AMP_OPT_LEVEL = 'O1' if options.autocast else 'O0'
    config.AMP_TYPE, config.TRAIN.COMPILE = 'bfloat16', backend
    config.DATA.BATCH_SIZE = options.batch
    torch.manual_seed(0)
    model = timm.create_model(options.model, img_size=options.img, num_classes=10)
    client = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, optimizer = initialize(
        config, model, client, {'zero_optimization': {'stage': options.stage}}
    )
    scaler = NativeScalerWithGradNormCount()
    images = torch.randn(options.batch, 3, options.img, options.img)
    images, labels = on_device(images, torch.arange(options.batch) % 10)

    def update() -> None:
        for _ in range(options.updates):
            scaler(cross_entropy(engine(images).float(), labels), optimizer)

    start = time.perf_counter()
    update()
    print(f'{backend or "not compiled"}: first updates {time.perf_counter() - start:.1f} s')
    return update


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints a line for each way."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--model', default='vit_tiny_patch16_224', help="timm's name")
    parser.add_argument('--img', type=int, default=96, help='pixels')
    parser.add_argument('--batch', type=int, default=16, help='images')
    parser.add_argument('--stage', type=int, default=1, help='of ZeRO')
    parser.add_argument('--autocast', action='store_true', help='to bfloat16')
    parser.add_argument('--updates', type=int, default=3, help='a sample')
    parser.add_argument('--threads', type=int, default=2, help='of torch')
    parser.add_argument('--rounds', type=int, default=ROUNDS, help='pairs')
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    ways = {'compiled': 'inductor', 'not compiled': ''}
    contenders = {name: Contender(make(options, backend)) for name, backend in ways.items()}
    samples = measure(contenders, options.rounds)
    plain, images = samples['not compiled'], options.batch * options.updates
    print(f'{options.model}, {options.img} pixels, {options.threads} threads, ZeRO {options.stage}')
    for name, seconds in samples.items():
        rates, ratios = summary([images / each for each in seconds]), paired_ratios(plain, seconds)
        print(
            f'{name:14} {rates.median:8.3g} [{rates.min:.3g}-{rates.max:.3g}] images/s; speed / '
            f"not compiled's {statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
        )


if __name__ == '__main__':
    main()
