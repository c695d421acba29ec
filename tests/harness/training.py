"""Image folders, small configs, and what ranks do in the tests of the training program."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from yacs.config import CfgNode

from internvl_ds import initialize
from internvl_ds.checkpoint.tag.output_lock import LOCK
from internvl_ds.config.tree import default_config, get_config, merge_opts
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine import registry as internvl_engine
from internvl_ds.engine.epochs import seed_everything
from internvl_ds.errors import RankError
from internvl_ds.train.data import build_loaders, start_epoch
from internvl_ds.train.evaluate import evaluate
from internvl_ds.train.loop import run, train_one_epoch
from internvl_ds.train.model import build_model
from internvl_ds.train.objective.criterion import build_criterion
from internvl_ds.train.optim import build_optimizer, build_scheduler, scaled_lrs
from internvl_ds.train.setup import setup
from tests.engine.scheduling import caught_warnings


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
        'EVAL_LOADED': False,
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


def follow_plain_loop(data: str, output: str, stages: list[int]) -> list[dict[str, Any]]:
    """Three epochs of the program on these ranks, and of a plain loop that sees all ranks' images.

    Each is of 7 micro-batches in groups of 4, so that its second group is shorter.
    """
    return [_follow_plain_loop(data, f'{output}/{stage}', stage) for stage in stages]


def _follow_plain_loop(data: str, output: str, stage: int) -> dict[str, Any]:
    config = small_config(
        Path(data), OUTPUT=output, DATA__BATCH_SIZE=2, TRAIN__ACCUMULATION_STEPS=4,
        TRAIN__OPTIMIZER__NAME='sgd', TRAIN__BASE_LR=1.0, TRAIN__EPOCHS=3,
        TRAIN__WARMUP_EPOCHS=1, TRAIN__CLIP_GRAD=0.5, TRAIN__LR_LAYER_DECAY=True,
        MODEL__DROP_PATH_RATE=0.0, TRAIN__AUTO_RESUME=False,
    )  # fmt: skip
    with caught_warnings() as warned:
        state = setup(config, {'zero_optimization': {'stage': stage}}, logging.getLogger('test'))
    start = {name: p.clone() for name, p in whole_weights(state.engine).items()}
    for epoch in range(3):
        record = train_one_epoch(state, epoch)
        state.position.reset()

    seed_everything(config.SEED)
    model = build_model(config).train()
    lrs = scaled_lrs(config, world_size())
    optimizer = build_optimizer(config, model, lrs.base)
    scheduler = build_scheduler(config, optimizer, 7, lrs)
    loaders = [build_loaders(config, other, world_size()).train for other in range(world_size())]
    criterion, updates = build_criterion(config, soft_targets=False), 0
    for epoch in range(3):
        for other, loader in enumerate(loaders):
            start_epoch(loader, config.SEED, epoch, other)
        batches, losses = [list(loader) for loader in loaders], []
        for group in (range(4), range(4, 7)):
            parts = [criterion(model(x), y) for b in batches for x, y in (b[i] for i in group)]
            losses += [part.item() for part in parts]
            (sum(parts) / len(parts)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.TRAIN.CLIP_GRAD)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            if len(group) == 4:
                scheduler.step_update(epoch * 7 + 3)
    got, expected = whole_weights(state.engine), dict(model.named_parameters())
    return {
        'moved': max((expected[n] - start[n]).abs().max().item() for n in start),
        'differs': max((expected[n] - got[n]).abs().max().item() for n in start),
        'warned': [text for text in warned if 'schedule' in text],
        'updates': [state.engine.global_steps, updates],
        'loss': [record['train_loss'], sum(losses) / len(losses)],
        'lr': [record['lr'], max(group['lr'] for group in optimizer.param_groups)],
    }


def whole_weights(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Every parameter, gathered."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def train_on_ranks(cfg: str, output: str, opts: list[str], ds_config: str | None) -> dict[str, Any]:
    """Runs the training program, and returns what it wrote."""
    config = get_config(Namespace(cfg=cfg, opts=opts, output=output))
    best = run(config, ds_config)
    folder = Path(config.OUTPUT)
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    return {
        'best': best,
        'metrics': [json.loads(line) for line in lines],
        'files': sorted(path.name for path in folder.iterdir() if path.name != LOCK),
    }


def time_on_ranks(data: str, output: str) -> dict[str, float]:
    """Has the training program time 5 updates after 3; returns what it did and what it returned."""
    config = small_config(
        Path(data), OUTPUT=output, DATA__BATCH_SIZE=2, TRAIN__ACCUMULATION_STEPS=2,
        TRAIN__EPOCHS=1, BENCH__UPDATES=5, BENCH__WARMUP=3,
    )  # fmt: skip
    speed = run(config, {'zero_optimization': {'stage': 1}})
    engine = next(iter(internvl_engine._registrations))
    return {'images_per_s': speed, 'updates': engine.global_steps}
