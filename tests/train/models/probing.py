"""What ranks do in test_probe_tags.py: the training program saves and resumes a linear probe."""

from __future__ import annotations

import shutil
from pathlib import Path

from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.dist.rendezvous import rank
from internvl_ds.train.loop import run
from tests.bench.harness import barrier
from tests.harness.training import small_config
from tests.train.models.tiny import tiny_config


def probe(data: str, root: str) -> dict[str, list[list[float]]]:
    """By CHECKPOINT.FROZEN: the weights after 2 epochs, and after the second was made anew."""
    found = {}
    for how in ('keep', 'once', 'omit'):
        output, seen = Path(root, how), []
        for _ in range(2):
            config = small_config(
                Path(data), MODEL__TYPE='intern_vit_6b', MODEL__KWARGS={}, DATA__IMG_SIZE=28,
                MODEL__INTERN_VIT_6B=dict(tiny_config().MODEL.INTERN_VIT_6B),
                MODEL__INTERN_VIT_6B__PRETRAINED=f'{root}/backbone.pth', MODEL__DROP_PATH_RATE=0.0,
                MODEL__INTERN_VIT_6B__FREEZE_VIT=True, MODEL__NUM_CLASSES=5, OUTPUT=str(output),
                TRAIN__EPOCHS=2, TRAIN__WARMUP_EPOCHS=0, SAVE_CKPT_NUM=0, CHECKPOINT__FROZEN=how,
            )  # fmt: skip
            run(config, {'zero_optimization': {'stage': 1}})
            weights = TagShards(output / 'ckpt_epoch_1').weights()
            seen.append([float(t.double().abs().sum()) for t in weights.values()])
            barrier()
            if rank() == 0:
                shutil.rmtree(output / 'ckpt_epoch_1')
                (output / 'latest').write_text('ckpt_epoch_0')
            barrier()
        found[how] = seen
    return found
