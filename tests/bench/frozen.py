"""Measures the tags of a linear probe with each CHECKPOINT.FROZEN: bytes and seconds, on two ranks.

    python -m tests.bench.frozen --params 100 --stages 1 3

What a tag writes is a number of bytes for each trained parameter, and a constant: from that follows
what it is for any frozen part. At 100M frozen parameters it takes 2 GB of disk and 3 GB of memory.
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

from internvl_ds import (
    NativeScalerWithGradNormCount,
    initialize,
    load_pretrained,
    save_checkpoint,
)
from internvl_ds.checkpoint.tag.manifest import is_shared
from internvl_ds.dist.rendezvous import rank
from tests.bench.figures import table
from tests.bench.harness import barrier
from tests.bench.subject import Stack, logger
from tests.harness.model import make_config, on_device, precision_values, zero_json
from tests.harness.ranks import run_ranks

HOWS = ('auto', 'keep', 'once', 'omit')
# InternViT-6B with the original's probe over the class token and the mean of the others.
FROZEN_6B, TRAINED_6B = 5_900_000_000, 2 * 3200 * 1000 + 1000 + 2 * 2 * 3200
_TOKENS, _FEATURES = 16, 64


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the arguments ask for, and prints tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--params', type=float, default=100, help='frozen, in millions')
    parser.add_argument('--stages', type=int, nargs='+', default=[1, 3])
    parser.add_argument('--folder', type=Path, default=Path('/var/tmp'), help='on the disk to use')
    options = parser.parse_args(arguments)
    for stage in options.stages:
        with tempfile.TemporaryDirectory(prefix='bench-', dir=options.folder) as folder:
            found = measure(options.params, stage, Path(folder))
        print(report(found, options.params, stage), flush=True)


def measure(millions: float, stage: int, folder: Path) -> dict[str, Any]:
    """What rank 0 saw of two saves with each setting."""
    values = {'root': str(folder), 'millions': millions, 'stage': stage}
    found: dict[str, Any] = run_ranks(probe, 2, folder, timeout=1800, **values)[0]
    return found


def report(found: dict[str, Any], millions: float, stage: int) -> str:
    """A table of the second tags, and what they would be at 5.9 G frozen parameters in bf16."""
    trained, each = found['trained'], found['bytes a trained parameter']
    rows = []
    for how in HOWS:
        own = found[how]
        more = FROZEN_6B * 2 if holds(found, how) else 0
        at_6b = TRAINED_6B * each + constant(found, how) + more
        rows.append(
            [how, f'{own["bytes"] / 1e6:.2f}', *(f'{s:.2f}' for s in own['seconds']),
             f'{own["frozen"] / 1e6:.1f}', f'{at_6b / 1e6:.0f}']
        )  # fmt: skip
    titles = [
        'FROZEN',
        'second tag writes, MB',
        'first save, s',
        'second save, s',
        'file of all, MB',
    ]
    return (
        f'\n{millions:g}M frozen, {trained} trained ({each} bytes each), bf16, ZeRO stage {stage}\n'
        + table([*titles, 'a tag at 5.9 G, MB'], rows)
    )


def holds(found: dict[str, Any], how: str) -> bool:
    """Whether the tags of a setting hold what is frozen; by default those of small models do."""
    return how in ('auto', 'keep') and not found[how]['frozen']


def constant(found: dict[str, Any], how: str) -> int:
    """Bytes of a second tag beside those of its parameters."""
    kept = found['frozen bytes'] if holds(found, how) else 0
    size: int = found[how]['bytes'] - found['trained'] * found['bytes a trained parameter'] - kept
    return size


def probe(root: str, millions: float, stage: int) -> dict[str, Any]:
    """Two saves of a probe with each setting, on every rank."""
    found: dict[str, Any] = {}
    source = f'{root}/weights.pth'
    for how in HOWS:
        config = make_config(
            f'{root}/{how}', DATA__BATCH_SIZE=2, CHECKPOINT__FROZEN=how, MODEL__PRETRAINED=source,
            SAVE_CKPT_NUM=0, **precision_values('bf16'),
        )  # fmt: skip
        torch.manual_seed(0)
        model = Stack(millions).bfloat16()
        if rank() == 0 and how == HOWS[0]:
            torch.save(model.state_dict(), source)
        barrier()
        load_pretrained(config, model, logger)
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        client = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
        engine, optimizer = initialize(config, model, client, zero_json(stage))
        scaler = NativeScalerWithGradNormCount()
        seconds = []
        for epoch in range(2):
            x = torch.randn(2, _TOKENS, _FEATURES).bfloat16()
            x, y = on_device(x, torch.tensor([0, 1]))
            loss = nn.functional.cross_entropy(engine(x).float(), y)
            scaler(loss, optimizer, 5.0)
            barrier()
            start = time.perf_counter()
            tag = save_checkpoint(config, epoch, engine, 0.0, optimizer, None, scaler, logger)
            barrier()
            seconds.append(time.perf_counter() - start)
        files = {p.name: p.stat().st_size for p in Path(tag).iterdir()}
        shared = sum(size for name, size in files.items() if is_shared(name))
        found[how] = {
            'bytes': sum(files.values()) - shared, 'frozen': shared, 'seconds': seconds
        }  # fmt: skip
        engine.destroy()
    parts = {True: 0, False: 0}
    for parameter in Stack(millions).parameters():
        parts[parameter.shape[0] == model.head.out_features] += parameter.numel()
    weights = 0 if stage == 3 else 2
    return {
        **found, 'trained': parts[True], 'frozen bytes': 2 * parts[False],
        'bytes a trained parameter': weights + 4 + 4,
    }  # fmt: skip


if __name__ == '__main__':
    main()
