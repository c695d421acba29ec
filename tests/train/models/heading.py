"""What ranks do in test_head_file.py: train and evaluate with a backbone's file and a head's."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from yacs.config import CfgNode

from internvl_ds import NativeScalerWithGradNormCount, initialize, load_checkpoint
from internvl_ds.config.tree import set_options
from internvl_ds.errors import CheckpointError
from internvl_ds.train.loop import run
from internvl_ds.train.model import build_model, input_dtype
from tests.engine.stepping import masters
from tests.harness.model import on_device
from tests.harness.training import small_config
from tests.train.models.tiny import images, tiny_config

_log = logging.getLogger('heading')


def begin_from_head(cells: list[tuple[int, str, bool]], root: str) -> list[dict[str, Any]]:
    """What an engine of each (stage, level, whether built under zero.Init) has of both files."""
    return [_begin(*cell, Path(root)) for cell in cells]


def _begin(stage: int, level: str, sharded: bool, root: Path) -> dict[str, Any]:
    config = tiny_config(
        PRETRAINED=str(root / 'backbone.pth'), MODEL__RESUME=str(root / 'head.pth'),
        DATA__BATCH_SIZE=4,
    )  # fmt: skip
    config.AMP_OPT_LEVEL, config.AMP_TYPE, config.OUTPUT = level, 'bfloat16', str(root / 'out')
    ds_config = {
        'train_micro_batch_size_per_gpu': 4,
        'zero_optimization': {'stage': stage},
        'bf16': {'enabled': level == 'O2'},
    }
    context = deepspeed.zero.Init(config_dict_or_path=ds_config) if sharded else nullcontext()
    torch.manual_seed(0)
    with context:
        model = build_model(config)
    drawn = _gathered(model)['head.weight'].float().std()
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, optimizer = initialize(config, model, torch.optim.SGD(trained, 0.1), ds_config)
    scaler = NativeScalerWithGradNormCount()
    accuracy = load_checkpoint(config, engine, optimizer, None, scaler, _log)
    files = [torch.load(root / name) for name in ('backbone.pth', 'head.pth')]
    wanted = {**files[0]['module'], **files[1]['model']}
    got = _gathered(engine.module)
    result = {
        'wrong': [n for n, t in wanted.items() if not torch.equal(got[n], t.to(got[n].dtype))],
        'masters': [n for n, m in masters(engine).items() if m != wanted[n].flatten().tolist()],
        'trained': sorted(masters(engine)),
        'statistics': str(engine.module.norm.running_var.dtype),
        'std': float(drawn),
        'start': [config.TRAIN.START_EPOCH, accuracy, engine.global_steps],
    }
    x, y = on_device(images(4).to(input_dtype(engine)), torch.arange(4))
    loss = F.cross_entropy(engine(x).float(), y)
    scaler(loss, optimizer, parameters=engine.parameters())
    result['moved'] = masters(engine)['head.bias'] != wanted['head.bias'].tolist()
    config.MODEL.RESUME = str(root / 'backbone.pth')
    try:
        load_checkpoint(config, engine, optimizer, None, scaler, _log)
    except CheckpointError as error:
        result['refused'] = str(error)
    engine.destroy()
    return result


def program_config(data: str, root: str) -> CfgNode:
    """Of the training program, with both files."""
    return small_config(
        Path(data), MODEL__TYPE='intern_vit_6b', MODEL__KWARGS={}, DATA__IMG_SIZE=28,
        MODEL__INTERN_VIT_6B=dict(tiny_config().MODEL.INTERN_VIT_6B), MODEL__NUM_CLASSES=5,
        MODEL__INTERN_VIT_6B__PRETRAINED=f'{root}/backbone.pth', MODEL__RESUME=f'{root}/head.pth',
        OUTPUT=f'{root}/program', TRAIN__EPOCHS=1, TRAIN__WARMUP_EPOCHS=0, TRAIN__EMA__ENABLE=True,
        MODEL__DROP_PATH_RATE=0.0,
    )  # fmt: skip


def evaluate_and_train(data: str, root: str) -> list[float]:
    """The best accuracy of the program at stage 3: it evaluates, trains an epoch, and resumes."""
    accuracies = []
    for values in ({'EVAL_MODE': True}, {}, {'TRAIN.EPOCHS': 2}):
        config = set_options(program_config(data, root), values)
        accuracies.append(run(config, {'zero_optimization': {'stage': 3}}))
    return accuracies


def _gathered(module: Any) -> dict[str, torch.Tensor]:
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: t.detach().clone() for name, t in module.state_dict().items()}
