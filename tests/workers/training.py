"""Image folders, small configs, and what ranks do in the tests of the training program."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from yacs.config import CfgNode

from internvl_ds import initialize
from internvl_ds.comm import rank, world_size
from internvl_ds.config import default_config, get_config, merge_opts
from internvl_ds.errors import RankError
from internvl_ds.train.data import build_loaders, seed_everything
from internvl_ds.train.evaluate import evaluate
from internvl_ds.train.loop import run
from internvl_ds.train.model import build_model


def write_folder(root: Path, classes: int, train: int, val: int, side: int = 16) -> Path:
    """Writes ``train`` and ``val`` images in all, dealt out to the classes in turn.

    A class shows in the image: its brightness rises with it.
    """
    noise = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        for label in range(classes):
            (root / split / f'class_{label}').mkdir(parents=True, exist_ok=True)
        for index in range(count):
            label = index % classes
            level = 30 + label * 200 // classes
            pixels = np.clip(noise.normal(level, 10, (side, side, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / f'class_{label}' / f'{index:03d}.png')
    return root


def small_config(data: Path, **values: Any) -> CfgNode:
    """A config for 16x16 images, without augmentation; dotted keys written with ``__`` override."""
    config = default_config()
    opts: dict[str, Any] = {
        'DATA.DATA_PATH': str(data),
        'DATA.IMG_SIZE': 16,
        'DATA.BATCH_SIZE': 4,
        'DATA.NUM_WORKERS': 0,
        'MODEL.TYPE': 'timm',
        'MODEL.NAME': 'vit_tiny_patch16_224',
        'MODEL.KWARGS': {'patch_size': 8, 'embed_dim': 24, 'depth': 2, 'num_heads': 2},
        'MODEL.NUM_CLASSES': 3,
        'AUG.MIXUP': 0.0,
        'AUG.CUTMIX': 0.0,
        'AUG.AUTO_AUGMENT': 'none',
        'AUG.COLOR_JITTER': 0.0,
        'AUG.REPROB': 0.0,
        'AMP_OPT_LEVEL': 'O0',
    }
    opts.update({key.replace('__', '.'): value for key, value in values.items()})
    merge_opts(config, [item for pair in opts.items() for item in pair])
    return config


class Brightness(nn.Module):
    """Tells classes apart by brightness, through weights that a ZeRO engine can partition."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(images).mean(dim=(2, 3)))


def brightness(config: CfgNode) -> nn.Module:
    """For MODEL.FACTORY."""
    return Brightness(config.MODEL.NUM_CLASSES)


def evaluate_on_ranks(data: str, stage: int, level: str, batch_size: int) -> dict[str, float]:
    """Evaluates a fixed random model through an engine."""
    config = small_config(
        Path(data), EVAL_MODE=True, AMP_OPT_LEVEL=level, AMP_TYPE='bfloat16',
        DATA__BATCH_SIZE=batch_size,
    )  # fmt: skip
    loaders = build_loaders(config, rank(), world_size())
    seed_everything(0)
    engine, _ = initialize(
        config, build_model(config), None, {'zero_optimization': {'stage': stage}}
    )
    engine.train()
    result = evaluate(config, engine, loaders.val, engine.device)
    return {**vars(result), 'training': engine.module.training}


def evaluate_with_a_padding_sampler(data: str) -> str:
    """torch's own sampler counts some images twice: that must not pass."""
    config = small_config(Path(data), EVAL_MODE=True)
    dataset = build_loaders(config, rank(), world_size()).val.dataset
    loader: DataLoader = DataLoader(
        dataset, batch_size=4, sampler=DistributedSampler(dataset, shuffle=False)
    )
    try:
        evaluate(config, build_model(config), loader, torch.device('cpu'))
    except RankError as error:
        return str(error)
    return 'no error'


def train_on_ranks(cfg: str, output: str, opts: list[str], ds_config: str | None) -> dict[str, Any]:
    """Runs the training program, and returns what it wrote."""
    config = get_config(Namespace(cfg=cfg, opts=opts, output=output))
    best = run(config, ds_config)
    folder = Path(config.OUTPUT)
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    return {
        'best': best,
        'metrics': [json.loads(line) for line in lines],
        'files': sorted(path.name for path in folder.iterdir()),
    }
