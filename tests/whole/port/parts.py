"""What the two scripts import beside the ten names: configuration, data, model, schedule.

They stand for the original's config.py, dataset/, models/, optimizer.py and lr_scheduler.py, which
a port leaves as they are.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from yacs.config import CfgNode as CN

CLASSES, FEATURES = 5, 48
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


# The keys that the call sites read, and no other: an adapter has defaults for the rest.
_DEFAULTS: dict[str, Any] = {
    'DATA': {'BATCH_SIZE': 4, 'NUM_WORKERS': 0, 'IMAGES': 88},
    'MODEL': {
        'NAME': 'port', 'RESUME': '', 'PRETRAINED': '', 'DROP_RATE': 0.0, 'LABEL_SMOOTHING': 0.1,
    },
    'TRAIN': {
        'START_EPOCH': 0, 'EPOCHS': 2, 'WARMUP_EPOCHS': 1, 'WEIGHT_DECAY': 0.05, 'BASE_LR': 0.5,
        'WARMUP_LR': 1e-3, 'MIN_LR': 1e-2, 'CLIP_GRAD': 5.0, 'AUTO_RESUME': True,
        'ACCUMULATION_STEPS': 1, 'OPTIMIZER': {'NAME': 'adamw', 'USE_ZERO': False},
        'EMA': {'ENABLE': True, 'DECAY': 0.9},
    },
    'AUG': {'MIXUP': 0.0, 'NOISE': 0.0},
    'AMP_OPT_LEVEL': '', 'AMP_TYPE': 'bfloat16', 'OUTPUT': '', 'SAVE_FREQ': 1, 'EVAL_FREQ': 1,
    'PRINT_FREQ': 10, 'SEED': 0, 'EVAL_MODE': False, 'THROUGHPUT_MODE': False, 'LOCAL_RANK': 0,
}  # fmt: skip


def get_config(args: Any) -> CN:
    """The configuration from --opts and flags, as the original merges them."""
    config = CN(copy.deepcopy(_DEFAULTS))
    config.merge_from_list(args.opts or [])
    config.DATA.BATCH_SIZE = args.batch_size or config.DATA.BATCH_SIZE
    config.MODEL.RESUME = args.resume or config.MODEL.RESUME
    config.MODEL.PRETRAINED = args.pretrained or config.MODEL.PRETRAINED
    config.TRAIN.ACCUMULATION_STEPS = args.accumulation_steps
    config.AMP_OPT_LEVEL = args.amp_opt_level
    config.OUTPUT = os.path.join(args.output, config.MODEL.NAME)
    config.EVAL_MODE, config.THROUGHPUT_MODE = args.eval, args.throughput
    config.SAVE_CKPT_NUM = args.save_ckpt_num
    config.TRAIN.OPTIMIZER.USE_ZERO = args.use_zero
    config.freeze()
    return config


class Images(Dataset):
    """Vectors whose class shows; with AUG.NOISE each draws from all three generators."""

    def __init__(self, total: int, noise: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(total) % CLASSES
        means = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1))
        self.images = torch.randn(total, FEATURES, generator=generator) + means[self.targets]
        self.noise = noise

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        if self.noise:
            shift = random.random() + np.random.random()
            image = image + self.noise * (torch.randn(FEATURES) + shift)
        return image, int(self.targets[index])


def build_loader(config: CN) -> tuple[Any, ...]:
    """Data sets, loaders and mixup; workers live on between epochs, as the original's do."""
    dataset_train = Images(config.DATA.IMAGES, config.AUG.NOISE, 2)
    dataset_val = Images(30, 0.0, 3)

    def loader(dataset: Images, training: bool) -> DataLoader:
        return DataLoader(
            dataset, sampler=DistributedSampler(dataset, shuffle=training),
            batch_size=config.DATA.BATCH_SIZE, num_workers=config.DATA.NUM_WORKERS,
            drop_last=training, persistent_workers=config.DATA.NUM_WORKERS > 0,
        )  # fmt: skip

    mixup_fn = None
    if config.AUG.MIXUP > 0:
        mixup_fn = Mixup(config.AUG.MIXUP, num_classes=CLASSES)
    return (dataset_train, dataset_val, loader(dataset_train, True), loader(dataset_val, False),
            mixup_fn)  # fmt: skip


class Net(nn.Module):
    """Sizes that divide by nothing, a residual, and dropout."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 37)
        self.norm = nn.LayerNorm(37)
        self.body = nn.Linear(37, 37)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(37, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        return 1.6 * self.head(self.drop(x + torch.nn.functional.gelu(self.body(x))))  # clipped


def build_model(config: CN) -> nn.Module:
    """From the global generator, which differs between ranks, as in the original."""
    return Net(config.MODEL.DROP_RATE)


def build_optimizer(config: CN, model: nn.Module) -> torch.optim.Optimizer:
    """A parameter group per tensor, as the original builds them."""
    lr, groups = config.TRAIN.BASE_LR, []
    for name, parameter in model.named_parameters():
        decay = 0.0 if parameter.dim() == 1 else config.TRAIN.WEIGHT_DECAY
        groups.append({'params': [parameter], 'weight_decay': decay, 'lr': lr, 'name': name})
    if config.TRAIN.OPTIMIZER.NAME == 'sgd':
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, lr=lr)
    return torch.optim.AdamW(groups, lr=lr)


def build_scheduler(config: CN, optimizer: Any, n_iter_per_epoch: int) -> Any:
    """A cosine over micro-batches."""
    train = config.TRAIN
    return CosineLRScheduler(
        optimizer, t_initial=train.EPOCHS * n_iter_per_epoch, lr_min=train.MIN_LR,
        warmup_lr_init=train.WARMUP_LR, warmup_t=train.WARMUP_EPOCHS * n_iter_per_epoch,
        cycle_limit=1, t_in_epochs=False,
    )  # fmt: skip


def create_logger(output_dir: str, dist_rank: int, name: str) -> logging.Logger:
    """To a file of each rank."""
    logger = logging.getLogger(f'{name} {output_dir}')
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.FileHandler(Path(output_dir, f'log_rank{dist_rank}.txt')))
    return logger


def record(config: CN, **values: Any) -> None:
    """A line of exact numbers, for the test; each rank has a file."""
    with Path(config.OUTPUT, f'record_{dist.get_rank()}.jsonl').open('a') as file:
        file.write(json.dumps(values) + '\n')


def end_here(epoch: int, idx: int) -> None:
    """Kills this rank where PORT_KILL says ``epoch:idx``."""
    if os.environ.get('PORT_KILL') == f'{epoch}:{idx}':
        os.kill(os.getpid(), signal.SIGKILL)
