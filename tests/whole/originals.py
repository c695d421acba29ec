"""The original's YAML files at a tiny size: their data and weights, and runs of them on ranks."""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import yaml

from internvl_ds.config import get_config
from internvl_ds.config.tree import nest
from internvl_ds.dist.rendezvous import rank
from internvl_ds.errors import InternvlDsError
from internvl_ds.train.datasets.imagenet import wnids_1k
from internvl_ds.train.loop import run
from internvl_ds.train.model import build_model
from tests.train.datasets.made import write_image

TABLE = Path(__file__).with_name('original_yamls.json')
CLASSES = (0, 1, 6, 107, 113, 397)  # in ImageNet-A and ImageNet-R, or in one of them
TINY = {
    'EMBED_DIM': 32, 'NUM_HEADS': 4, 'DEPTH': 2,
}  # fmt: skip
# Two updates on 2 ranks, of 8 images; then an evaluation and a save. The made folder of training
# images has fewer than 1000 classes, so its list is named.
SETTINGS = {
    **{f'MODEL.INTERN_VIT_6B.{key}': value for key, value in TINY.items()},
    'DATA.BATCH_SIZE': 2, 'DATA.NUM_WORKERS': 0, 'TRAIN.EPOCHS': 1, 'TRAIN.WARMUP_EPOCHS': 0,
    'AMP_TYPE': 'bfloat16', 'DATA.META_DATA': 'meta_data',
}  # fmt: skip


def original_yamls() -> dict[str, dict[str, Any]]:
    """Path of each file below ``configs/``, without its suffix -> its dotted keys and values."""
    table = json.loads(TABLE.read_text())
    return {name: {**table['common'], **values} for name, values in table['files'].items()}


def write_all(folder: Path) -> None:
    """Writes ``configs/``, ``data/``, ``pretrained/`` and ``meta_data/`` as in the original."""
    for name, values in original_yamls().items():
        tree: dict[str, Any] = {}
        for key, value in values.items():
            _merge(tree, nest(key.split('.'), value))
        path = folder / 'configs' / f'{name}.yaml'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
    _write_data(folder)
    _write_weights(folder)


def _merge(tree: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict):
            _merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


def _write_data(folder: Path) -> None:
    wnids, data, lists = wnids_1k(), folder / 'data', folder / 'meta_data'
    lists.mkdir()
    train = [(f'{wnids[c]}/{wnids[c]}_{n}.JPEG', c) for n in range(2) for c in CLASSES[:4]]
    val = [(f'ILSVRC2012_val_{n + 1:08d}.JPEG', c) for n, c in enumerate(CLASSES)]
    for split, lines in (('train', train), ('val', val)):
        (lists / f'{split}.txt').write_text(''.join(f'{name} {c}\n' for name, c in lines))
        for name, c in lines:
            write_image(data / 'imagenet-1k' / split / name, c)
    for variant in ('imagenet-a', 'imagenet-r', 'imagenet-sketch'):
        for c in CLASSES:
            write_image(data / variant / wnids[c] / '0.jpg', c)
    for c in CLASSES:
        write_image(data / 'imagenetv2' / 'ImageNetV2-matched-frequency' / str(c) / '0.jpeg', c)


def _write_weights(folder: Path) -> None:
    (folder / 'pretrained').mkdir()
    torch.manual_seed(0)
    for values in original_yamls().values():
        path = folder / values['MODEL.INTERN_VIT_6B.PRETRAINED']
        if not path.exists():
            size = values['MODEL.INTERN_VIT_6B.PRETRAIN_SIZE']
            model: Any = _built(folder, {'DATA.IMG_SIZE': size})
            state = model.state_dict()
            torch.save({'module': {key: state[key] for key in model.backbone_keys}}, path)
    head = {key: state[key] for key in state if key not in model.backbone_keys}
    torch.save({'model': head}, folder / 'pretrained' / 'intern_vit_6b_224px_head.pth')


def _built(folder: Path, values: dict[str, Any]) -> torch.nn.Module:
    cfg = folder / 'configs' / 'intern_vit_6b_1k_224.yaml'
    values = {**SETTINGS, **values, 'MODEL.INTERN_VIT_6B.PRETRAINED': None}
    return build_model(get_config(Namespace(cfg=str(cfg), opts=_opts(values))))


def _opts(values: dict[str, Any]) -> list[str]:
    return [text for key, value in values.items() for text in (key, str(value))]


def family_of(name: str) -> str:
    """The file that trains what a file evaluates; its own name where it trains."""
    return re.sub(r'(_test)?_imagenet.*', '', name)


def start_all(folder: str, names: list[str], stage: int) -> dict[str, str]:
    """On ranks, in the original's folder: trains, or evaluates; what each run ended with."""
    os.chdir(folder)
    return {name: _start(name, stage) for name in names}


def _start(name: str, stage: int) -> str:
    """A variant evaluates what its family's file has trained; the README's own a head's file."""
    family = family_of(name)
    output, values = Path(f'work_dirs/{stage}'), dict(SETTINGS)
    args = Namespace(cfg=f'configs/{name}.yaml', output=str(output), opts=_opts(values))
    if family != name:
        args.eval, args.resume = True, str(output / Path(family).name)
        if family == 'intern_vit_6b_1k_224':
            args.resume = 'pretrained/intern_vit_6b_224px_head.pth'
    config = get_config(args)
    try:
        run(config, {'zero_optimization': {'stage': stage}})
    except InternvlDsError as error:
        return f'{type(error).__name__}: {error}'
    if rank():
        return ''
    log = Path(config.OUTPUT, 'log_rank0.txt').read_text()
    measured = re.findall(r'(?:ReaL )?Accuracy of the network on the (\d+) test images', log)
    if family != name:
        return f'evaluated {measured[-1]} images'
    record = json.loads(Path(config.OUTPUT, 'metrics.jsonl').read_text().splitlines()[-1])
    return f'trained epoch {record["epoch"]}' if record['train_loss'] > 0 else repr(record)
