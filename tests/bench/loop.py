"""Measures the training program's loop beside the original's under DDP and timm's train.py.

    python -m tests.bench.loop --model vit_tiny_patch16_224 --img 64 --stages 0 1 2 --rounds 9

All train the same model in one process a rank, on the same JPEG files with the same crop, flip and
normalisation, through as many workers; an epoch each in turns, in random order within a round. A
sample is the seconds of the epoch's updates after the first two (``updates``), and of the whole
epoch with the start of its workers (``epoch``). The program does all that it does in training but
save: signals are listened to, and rank 0 writes its log.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import ImageFolder
from yacs.config import CfgNode

from internvl_ds.dist.preemption import Preemption
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.epochs import seed_everything
from internvl_ds.train.loop import train_one_epoch
from internvl_ds.train.model import build_model
from internvl_ds.train.optim import build_optimizer, scaled_lrs
from internvl_ds.train.reporting.log import close_log, open_log
from internvl_ds.train.setup import Run, setup
from tests.bench.figures import Pair, ratios_report, ratios_table, seconds_report, seconds_table
from tests.bench.harness import ROUNDS, Contender, measure
from tests.bench.loader import CLASSES, timms_loader, write_pictures
from tests.bench.plain_loops import Parts, as_the_original, as_timms
from tests.harness.ranks import run_ranks
from tests.harness.training import small_config

OURS, ORIGINALS, TIMMS = 'training program', "the original's, DDP", "timm's train.py, DDP"
# Of seconds, so that 1 is as many images a second as theirs, and less is more of them.
PAIRS = tuple(
    Pair(f'{OURS}: {part}', f'{other}: {part}', 1.0)
    for part in ('updates', 'epoch')
    for other in (ORIGINALS, TIMMS)
)
_UNTIMED = 2  # updates before `updates` begins
_TIMEOUT = 3600.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every stage asked for, prints tables, and writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    add = parser.add_argument
    add('--model', default='vit_tiny_patch16_224', help="timm's name, of a ViT")
    add('--img', type=int, default=64, help='pixels that the model sees')
    add('--batch', type=int, default=16, help='images a rank and update')
    add('--updates', type=int, default=12, help='of an epoch, each a sample')
    add('--workers', type=int, default=1, help='of the loader, on each rank')
    add('--width', type=int, default=160, help='pixels of the files; the height is 3/4 of it')
    add('--ranks', type=int, default=2)
    add('--stages', type=int, nargs='+', default=[0, 1, 2], help='of ZeRO')
    add('--autocast', action='store_true', help='to bfloat16')
    add('--ema', action='store_true', help="the program keeps an average; the others don't")
    add('--rounds', type=int, default=ROUNDS, help='counted samples of each loop')
    add('--gpu', action='store_true', help='one GPU a rank; otherwise the CPU')
    add('--json', type=Path, help='where all samples go')
    add('--folder', type=Path, default=Path('/var/tmp'), help='where files go')
    options = parser.parse_args(arguments)
    env = {'INTERNVL_DS_TEST_DEVICE': 'own', 'DS_ACCELERATOR': 'cuda'} if options.gpu else {}
    report = []
    with tempfile.TemporaryDirectory(prefix='bench-', dir=options.folder) as folder:
        data = Path(folder) / 'images'
        write_pictures(data, options.updates * options.batch * options.ranks, options.width)
        for stage in options.stages:
            print(f'ZeRO stage {stage}...', file=sys.stderr, flush=True)
            values = {name: getattr(options, name) for name in (
                'model', 'img', 'batch', 'updates', 'workers', 'autocast', 'ema', 'rounds',
            )}  # fmt: skip
            entry = run_ranks(
                measure_loops, options.ranks, Path(folder), timeout=_TIMEOUT, env=env, stage=stage,
                data=data, output=Path(folder) / f'output_{stage}', **values,
            )[0]  # fmt: skip
            report.append(entry)
            print(tables(entry), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + '\n')


def tables(entry: dict[str, Any]) -> str:
    """One stage's report as markdown."""
    rates = [f'{name}: {rate:.1f} images a second' for name, rate in entry['rates'].items()]
    return '\n\n'.join(
        [
            f'### ZeRO stage {entry["stage"]}, {entry["ranks"]} ranks, {entry["model"]} at '
            f'{entry["img"]} pixels, batches of {entry["batch"]}, {entry["updates"]} updates an '
            f'epoch',
            '\n'.join(rates),
            seconds_table(entry['seconds']),
            ratios_table(entry['ratios']),
        ]
    )


def measure_loops(
    data: str, output: str, model: str, img: int, batch: int, updates: int, workers: int,
    stage: int, autocast: bool, ema: bool, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """All three loops, in turns. Every rank calls it."""
    config = small_config(
        Path(data), OUTPUT=output, MODEL__NAME=model, MODEL__KWARGS={'img_size': img},
        MODEL__NUM_CLASSES=CLASSES, DATA__IMG_SIZE=img, DATA__BATCH_SIZE=batch,
        DATA__NUM_WORKERS=workers, TRAIN__EPOCHS=rounds + 1, TRAIN__AUTO_RESUME=False,
        TRAIN__WARMUP_EPOCHS=0, TRAIN__EMA__ENABLE=ema, AMP_TYPE='bfloat16',
        AMP_OPT_LEVEL='O1' if autocast else 'O0',
    )  # fmt: skip
    logger = open_log(output, rank(), console=False)
    logging.getLogger('bench').parent = logger  # whose lines go to the same file
    logging.getLogger('bench').setLevel(logging.INFO)
    state = setup(config, {'zero_optimization': {'stage': stage}}, logger)
    laps = Laps()
    loops = {
        OURS: functools.partial(_train_ours, state, laps),
        ORIGINALS: functools.partial(as_the_original, _parts(state, laps)),
        TIMMS: functools.partial(as_timms, _parts(state, laps)),
    }
    assert state.loaders.train is not None
    assert len(state.loaders.train) == updates
    with Preemption(config) as state.preemption:
        samples = measure({n: Contender(_timed(e, laps)) for n, e in loops.items()}, rounds)
    close_log(logger)
    images = (updates - _UNTIMED) * batch * world_size()
    seconds = seconds_report(samples)
    return {
        'stage': stage, 'ranks': world_size(), 'model': model, 'img': img, 'batch': batch,
        'updates': updates, 'seconds': seconds, 'ratios': ratios_report(samples, PAIRS),
        'rates': {name: images / seconds[f'{name}: updates']['median'] for name in loops},
    }  # fmt: skip


class Laps:
    """The times of updates; in the place of the program's own stopwatch."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def lap(self, images: int = 0) -> None:
        """Counts an update."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def _timed(train: Callable[[int], None], laps: Laps) -> Callable[[], dict[str, float]]:
    epochs = iter(range(1 << 30))

    def run() -> dict[str, float]:
        laps.times.clear()
        start = time.perf_counter()
        train(next(epochs))
        end = time.perf_counter()
        return {'updates': laps.times[-1] - laps.times[_UNTIMED - 1], 'epoch': end - start}

    return run


def _train_ours(state: Run, laps: Laps, epoch: int) -> None:
    state.stopwatch = laps  # type: ignore[assignment]
    train_one_epoch(state, epoch)
    state.position.reset()


def _parts(state: Run, laps: Laps) -> Parts:
    """Another model, optimizer and loader of the same kinds, for a plain loop."""
    config: CfgNode = state.config
    seed_everything(config.SEED)
    device = state.engine.device
    model = build_model(config).to(device)
    optimizer = build_optimizer(config, model, scaled_lrs(config, world_size()).base)
    train = state.loaders.train
    assert train is not None
    dataset: Any = train.dataset
    loader = timms_loader(
        Path(config.DATA.DATA_PATH), dataset.images.transform, config.AUG, config.DATA.BATCH_SIZE,
        config.DATA.NUM_WORKERS, distributed=True, size=config.DATA.IMG_SIZE,
    )  # fmt: skip
    assert isinstance(loader.dataset, ImageFolder)
    return Parts(
        model=DistributedDataParallel(model),
        loader=loader,
        optimizer=optimizer,
        schedule=CosineLRScheduler(optimizer, config.TRAIN.EPOCHS * len(loader), t_in_epochs=False),
        criterion=torch.nn.CrossEntropyLoss(label_smoothing=config.MODEL.LABEL_SMOOTHING),
        device=device,
        autocast=config.AMP_OPT_LEVEL == 'O1',
        clip=config.TRAIN.CLIP_GRAD,
        every=config.PRINT_FREQ,
        lap=laps.lap,
    )


if __name__ == '__main__':
    main()
