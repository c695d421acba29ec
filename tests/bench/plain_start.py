"""What `tests.bench.start` compares with: a script that resumes and trains, and checks nothing."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.data import create_transform
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision.datasets import ImageFolder

_SAYS = 'the first update came '
_BATCH, _LR, _CLIP = 2, 1e-4, 5.0


def main() -> None:
    """Builds all, loads or not, and takes an update."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--engine', choices=('ddp', 'deepspeed'), required=True)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--shape', type=json.loads, required=True, help="of timm's ViT, JSON")
    parser.add_argument('--folder', type=Path, required=True, help='of the checkpoint')
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--stage', type=int, default=0)
    parser.add_argument('--save', action='store_true', help='save after the update, load nothing')
    options = parser.parse_args()
    torch.manual_seed(0)
    (_ddp if options.engine == 'ddp' else _deepspeed)(options)
    os._exit(0)  # not measured; with DeepSpeed the interpreter's end was seen to take for ever


def _data(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The first batch of a new loader."""
    size = options.shape['img_size']
    images = ImageFolder(
        str(options.data / 'train'), create_transform((3, size, size), is_training=True)
    )
    loader = DataLoader(
        images, _BATCH, sampler=DistributedSampler(images), num_workers=options.workers,
        drop_last=True,
    )  # fmt: skip
    return next(iter(loader))


def _model(options: argparse.Namespace) -> Any:
    classes = len(list((options.data / 'train').iterdir()))
    return timm.create_model('vit_tiny_patch16_224', num_classes=classes, **options.shape)


def _ddp(options: argparse.Namespace) -> None:
    dist.init_process_group('gloo')
    model = DistributedDataParallel(_model(options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR)
    path = options.folder / 'checkpoint.pth'
    if not options.save:
        content = torch.load(path, map_location='cpu', weights_only=True)
        model.module.load_state_dict(content['model'])
        optimizer.load_state_dict(content['optimizer'])
    images, labels = _data(options)
    cross_entropy(model(images), labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
    optimizer.step()
    print(_SAYS, flush=True)
    if options.save and dist.get_rank() == 0:
        path.parent.mkdir(parents=True)
        torch.save({'model': model.module.state_dict(), 'optimizer': optimizer.state_dict()}, path)
    dist.barrier()
    dist.destroy_process_group()


def _deepspeed(options: argparse.Namespace) -> None:
    import deepspeed

    deepspeed.init_distributed(auto_mpi_discovery=False)
    config = {
        'train_micro_batch_size_per_gpu': _BATCH,
        'gradient_clipping': _CLIP,
        'zero_optimization': {'stage': options.stage},
        'zero_allow_untested_optimizer': True,
    }
    model = _model(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if not options.save:
        engine.load_checkpoint(str(options.folder))
    images, labels = _data(options)
    engine.backward(cross_entropy(engine(images), labels))
    engine.step()
    print(_SAYS, flush=True)
    if options.save:
        engine.save_checkpoint(str(options.folder))
    deepspeed.comm.barrier()
    deepspeed.comm.destroy_process_group()


if __name__ == '__main__':
    main()
