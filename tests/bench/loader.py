"""Measures the training loader in images a second, beside timm's own on the same pictures.

    python -m tests.bench.loader --images 512 --rounds 9 --json figures.json

Both read JPEG files of the size of ImageNet's through 2 workers, with the same crop, flip and
normalisation. `epoch` is a whole epoch, from the start of the workers on; `steady` begins when
the first batches have come; `cpu` is what the rank and its workers compute in the epoch, which
depends less on what else the machine does. Noise and smooth areas are mixed, as in photographs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_loader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from internvl_ds.train.data import build_loaders, start_epoch
from tests.bench.figures import Pair, ratios_report, ratios_table, seconds_report, seconds_table
from tests.bench.harness import ROUNDS, Contender, measure
from tests.harness.training import small_config

CLASSES = 4
OURS, TIMMS = 'training loader', 'timm.data.create_loader'
# Of seconds, so that 1 is as many images a second as timm's, and less is more of them.
PAIRS = (
    Pair(f'{OURS}: steady', f'{TIMMS}: steady', 1.0),
    Pair(f'{OURS}: epoch', f'{TIMMS}: epoch', 1.0),
    Pair(f'{OURS}: cpu', f'{TIMMS}: cpu', 1.0),
)
_UNTIMED = 2  # batches of each worker that come before `steady` begins


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints tables, and writes JSON where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--images', type=int, default=512, help='files, all read in each sample')
    parser.add_argument('--batch', type=int, default=16, help='images of a batch')
    parser.add_argument('--workers', type=int, default=2, help='of each loader')
    parser.add_argument('--width', type=int, default=500, help='pixels; the height is 3/4 of it')
    parser.add_argument('--rounds', type=int, default=ROUNDS, help='counted samples of each loader')
    parser.add_argument('--json', type=Path, help='where all samples go')
    parser.add_argument('--folder', type=Path, default=Path('/var/tmp'), help='where files go')
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix='bench-', dir=options.folder) as folder:
        kilobytes = write_pictures(Path(folder), options.images, options.width)
        report = measure_loaders(
            Path(folder), options.images, options.batch, options.workers, options.rounds
        )
    report['kB an image'] = kilobytes
    print(tables(report), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + '\n')


def write_pictures(root: Path, count: int, width: int) -> float:
    """Writes JPEG files as ``train`` and one of each class as ``val``; returns their mean kB."""
    random = np.random.default_rng(0)
    size, sizes = (width, width * 3 // 4), []
    for split, images in (('train', count), ('val', CLASSES)):
        for index in range(images):
            path = root / split / f'class_{index % CLASSES}' / f'{index:05d}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new('RGB', size)
            for cells, share in ((5, 1.0), (40, 0.4), (max(size), 0.12)):
                noise = random.integers(0, 256, (cells * 3 // 4, cells, 3), np.uint8)
                layer = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
                image = Image.blend(image, layer, share)
            image.save(path, quality=92)
            sizes.append(path.stat().st_size)
    return sum(sizes) / len(sizes) / 1000


def measure_loaders(
    root: Path, images: int, batch: int, workers: int, rounds: int
) -> dict[str, Any]:
    """Samples both loaders, in turns."""
    config = small_config(
        root, DATA__IMG_SIZE=224, DATA__BATCH_SIZE=batch, DATA__NUM_WORKERS=workers,
        MODEL__NUM_CLASSES=CLASSES, DATA__PIN_MEMORY=False,
    )  # fmt: skip
    ours = build_loaders(config, 0, 1).train
    assert ours is not None
    dataset: Any = ours.dataset
    theirs = timms_loader(root, dataset.images.transform, config.AUG, batch, workers)
    epochs = iter(range(1 << 30))

    def read_ours() -> dict[str, float]:
        start_epoch(ours, config.SEED, next(epochs), 0)
        return timed(ours, len(ours), workers)

    contenders = {
        OURS: Contender(read_ours),
        TIMMS: Contender(lambda: timed(theirs, len(theirs), workers)),
    }
    samples = measure(contenders, rounds)
    whole = len(ours) * batch
    counts = {'steady': whole - _UNTIMED * workers * batch, 'epoch': whole, 'cpu': whole}
    report = seconds_report(samples)
    rates = {
        name: counts[name.rpartition(' ')[2]] / entry['median'] for name, entry in report.items()
    }
    return {
        'images': images, 'batch': batch, 'workers': workers, 'seconds': report,
        'images a second': rates, 'ratios': ratios_report(samples, PAIRS),
    }  # fmt: skip


def timms_loader(
    root: Path, transform: Any, aug: Any, batch: int, workers: int,
    distributed: bool = False, size: int = 224,
) -> Any:  # fmt: skip
    """timm's loader with the crop and flip of ``transform``, and its own way to a tensor."""
    data = ImageFolder(str(root / 'train'))
    loader: Any = create_loader(
        data, (3, size, size), batch, is_training=True, use_prefetcher=False,
        num_workers=workers, persistent_workers=False, pin_memory=False,
        mean=tuple(aug.MEAN), std=tuple(aug.STD), distributed=distributed,
    )  # fmt: skip
    *_, to_tensor, normalize = data.transform.transforms
    assert isinstance(to_tensor, transforms.ToTensor)
    data.transform = transforms.Compose([*transform.transforms[:-1], to_tensor, normalize])
    return loader


def timed(loader: Iterable[Any], batches: int, workers: int) -> dict[str, float]:
    """Seconds of an epoch, and of its batches after the first."""
    start, began, computed = time.perf_counter(), 0.0, cpu_seconds()
    seen = 0
    for seen, (images, _) in enumerate(loader, 1):
        assert images.dtype == torch.float32
        if seen == _UNTIMED * workers:
            began = time.perf_counter()
    end = time.perf_counter()
    assert seen == batches
    return {'epoch': end - start, 'steady': end - began, 'cpu': cpu_seconds() - computed}


def cpu_seconds() -> float:
    """What this process and its children that have ended have computed, the system included."""
    return sum(os.times()[:4])


def tables(report: dict[str, Any]) -> str:
    """The report as markdown."""
    rates = [
        f'{name}: {rate:.0f} images a second' for name, rate in report['images a second'].items()
    ]
    head = (
        f'### {report["images"]} images of {report["kB an image"]:.0f} kB, batches of '
        f'{report["batch"]}, {report["workers"]} workers'
    )
    return '\n\n'.join(
        [head, '\n'.join(rates), seconds_table(report['seconds']), ratios_table(report['ratios'])]
    )


if __name__ == '__main__':
    main()
