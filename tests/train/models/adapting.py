"""What ranks do in test_peft.py: train a timm model with LoRA adapters, and go on from a tag."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import timm
from peft import LoraConfig, get_peft_model
from torch import nn
from yacs.config import CfgNode

from internvl_ds.dist.rendezvous import rank
from internvl_ds.train.loop import run
from tests.bench.harness import barrier
from tests.harness.training import small_config

SIZES = {'img_size': 16, 'patch_size': 8, 'embed_dim': 24, 'depth': 2, 'num_heads': 2}
# The names of a plain checkpoint -> those of the wrapped model.
RENAMES = [
    (r'^', 'base_model.model.'),
    (r'(qkv|fc1)\.(weight|bias)$', r'\1.base_layer.\2'),
    (r'head\.(weight|bias)$', r'head.original_module.\1'),
]


def model(config: CfgNode) -> nn.Module:
    """MODEL.FACTORY: LoRA on qkv and the first layer of each MLP, and a head that trains."""
    settings = LoraConfig(r=2, target_modules=['qkv', 'fc1'], modules_to_save=['head'])
    return get_peft_model(
        timm.create_model('vit_tiny_patch16_224', num_classes=3, **SIZES), settings
    )


def adapt(data: str, root: str, weights: str) -> dict[str, Any]:
    """By CHECKPOINT.FROZEN and stage: the numbers of two epochs, and after the second again."""
    found: dict[str, Any] = {}
    for stage in (1, 3):
        for frozen in ('keep', 'once', 'omit'):
            output = Path(root, f'{frozen}_{stage}')
            seen = []
            for _ in range(2):
                config = small_config(
                    Path(data), OUTPUT=str(output), TRAIN__EPOCHS=2, TRAIN__WARMUP_EPOCHS=0,
                    MODEL__FACTORY='tests.train.models.adapting:model', CHECKPOINT__FROZEN=frozen,
                    MODEL__PRETRAINED=weights, MODEL__PRETRAINED_RENAME=RENAMES, SAVE_CKPT_NUM=5,
                )  # fmt: skip
                run(config, {'zero_optimization': {'stage': stage}})
                lines = (output / 'metrics.jsonl').read_text().splitlines()
                records = [json.loads(line) for line in lines]
                seen.append(
                    [[r[key] for key in ('train_loss', 'grad_norm', 'acc1')] for r in records]
                )
                barrier()
                if rank() == 0 and len(seen) == 1:
                    shutil.rmtree(output / 'ckpt_epoch_1')
                    (output / 'latest').write_text('ckpt_epoch_0')
                barrier()
            found[f'{frozen}_{stage}'] = seen
    return found
