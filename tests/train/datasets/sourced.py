"""The images of a folder in every other form that DATA.* reads."""

from __future__ import annotations

import csv
import io
import json
import logging
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from yacs.config import CfgNode

from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.epochs import seed_everything
from internvl_ds.errors import ConfigError
from internvl_ds.train.data import build_loaders
from internvl_ds.train.evaluate import evaluate
from internvl_ds.train.loop import run
from internvl_ds.train.model import build_model
from internvl_ds.train.setup import setup
from tests.harness.training import small_config

SPLITS = ('train', 'val')


def images_of(folder: Path, split: str) -> list[tuple[Path, str, int]]:
    """Path, class name and label of each image of a split of `write_folder`."""
    paths = sorted((folder / split).glob('*/*.png'))
    return [(path, path.parent.name, int(path.parent.name[-1])) for path in paths]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file to a tar file."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def pack(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """Writes a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as archive:
        for name, data in files:
            add(archive, name, data)
    return path


def write_tar(folder: Path, root: Path) -> None:
    """One tar file a split, with class folders in it and things that are no images."""
    for split in SPLITS:
        files = [
            (f'{split}/{name}/{p.name}', p.read_bytes()) for p, name, _ in images_of(folder, split)
        ]
        noise = [('README.txt', b'hello'), (f'{split}/class_0/._000.png', b'of another system')]
        pack(root / f'{split}.tar', [*noise, *reversed(files)])


def write_class_tars(folder: Path, root: Path, *, nested: bool = False) -> None:
    """A tar file a class, in a folder or inside another tar file."""
    for split in SPLITS:
        paths = []
        for name in ('class_0', 'class_1', 'class_2'):
            files = [(p.name, p.read_bytes()) for p, c, _ in images_of(folder, split) if c == name]
            paths.append(pack(root / split / f'{name}.tar', files))
        if nested:
            pack(root / f'{split}.tar', [(path.name, path.read_bytes()) for path in paths])


def write_nested_tars(folder: Path, root: Path) -> None:
    """As ImageNet's own training images are packed."""
    write_class_tars(folder, root, nested=True)


def write_shards(folder: Path, root: Path, *, of_json: bool = False) -> None:
    """WebDataset's form, 4 samples a shard."""
    for split in SPLITS:
        images = images_of(folder, split)
        for start in range(0, len(images), 4):
            files = []
            for path, name, label in images[start : start + 4]:
                key = f'{name}/{path.stem}'
                text = json.dumps({'label': label}) if of_json else str(label)
                files += [(f'{key}.png', path.read_bytes())]
                files += [(f'{key}.{"json" if of_json else "cls"}', text.encode())]
            pack(root / f'set-{split}-{start:06d}.tar', files)


def write_json_shards(folder: Path, root: Path) -> None:
    """WebDataset's form, with labels in JSON."""
    write_shards(folder, root, of_json=True)


def write_tables(folder: Path, root: Path, kind: str, names: bool) -> None:
    """CSV or JSON lines, whose paths are relative to the folder above the splits."""
    root.mkdir(parents=True, exist_ok=True)
    (root / 'images').symlink_to(folder)
    for split in SPLITS:
        rows = [
            {'path': f'images/{path.relative_to(folder)}', 'label': name if names else label}
            for path, name, label in images_of(folder, split)
        ]
        with (root / f'{split}.{kind}').open('w', newline='') as file:
            if kind == 'csv':
                writer = csv.DictWriter(file, ['label', 'path'])
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + '\n' for row in rows)


def write_saved(folder: Path, root: Path) -> None:
    """A data set of Hugging Face's, saved to a folder."""
    import datasets

    features = datasets.Features(
        {
            'image': datasets.Image(),
            'label': datasets.ClassLabel(3, [f'class_{i}' for i in range(3)]),
        }
    )
    splits = {}
    for split, name in zip(SPLITS, ('train', 'validation'), strict=True):
        images = images_of(folder, split)
        columns = {'image': [str(p) for p, _, _ in images], 'label': [n for _, _, n in images]}
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(root)


class Pictures(Dataset):
    """A user's data set of PIL images, with names and classes."""

    def __init__(self, folder: Path, split: str) -> None:
        self.images = images_of(folder, split)
        self.names = [str(path) for path, _, _ in self.images]
        self.classes = ['class_0', 'class_1', 'class_2']

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        path, _, label = self.images[index]
        return Image.open(path), label


class Encoded(Pictures):
    """The same, as the bytes of files and without names."""

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        del self.names

    def __getitem__(self, index: int) -> Any:
        path, _, label = self.images[index]
        return path.read_bytes(), label


def pictures(config: CfgNode, split: str) -> Pictures:
    """For DATA.FACTORY."""
    return Pictures(Path(config.DATA.DATA_PATH), split)


def encoded_pictures(config: CfgNode, split: str) -> Encoded:
    """For DATA.FACTORY."""
    return Encoded(Path(config.DATA.DATA_PATH), split)


# DATA.DATASET or a function for DATA.FACTORY, and what writes the images in that form, with what.
FORMS: dict[str, tuple[Any, ...]] = {
    'folder': ('folder',),
    'tar': ('tar', write_tar),
    'tar a class': ('tar', write_class_tars),
    'tars in a tar': ('tar', write_nested_tars),
    'shards': ('wds', write_shards),
    'shards of json': ('wds', write_json_shards),
    'csv of names': ('csv', write_tables, 'csv', True),
    'csv of numbers': ('csv', write_tables, 'csv', False),
    'jsonl of names': ('jsonl', write_tables, 'jsonl', True),
    'jsonl of numbers': ('jsonl', write_tables, 'jsonl', False),
    'saved': ('hfds', write_saved),
    'pictures': (pictures,),
    'bytes': (encoded_pictures,),
}


def settings_of(form: str, folder: Path, root: Path) -> tuple[Path, dict[str, Any]]:
    """DATA_PATH and settings that read the images in a form, which is written first."""
    dataset, *write = FORMS[form]
    if write:
        write[0](folder, root, *write[1:])
    if callable(dataset):
        return folder, {'DATA__FACTORY': f'{__name__}:{dataset.__name__}'}
    return (root if write else folder), {'DATA__DATASET': dataset}


def train_from(data: str, root: str, dataset: str, opts: dict[str, Any]) -> dict[str, Any]:
    """On ranks: two epochs, and again from a tag inside the second; what both have come to."""
    results = {}
    for name, resume in (('whole', ''), ('resumed', 'whole/ckpt_epoch_1_step_1')):
        config = small_config(
            Path(data), OUTPUT=f'{root}/{name}', DATA__DATASET=dataset, DATA__NUM_WORKERS=2,
            MODEL__NUM_CLASSES=0, MODEL__RESUME=resume and f'{root}/{resume}', AUG__REPROB=0.5,
            TRAIN__EPOCHS=2,
            TRAIN__WARMUP_EPOCHS=0, TRAIN__SAVE_STEPS=1, CHECKPOINT__KEEP_STEPS=9, SAVE_CKPT_NUM=0,
            TRAIN__AUTO_RESUME=False, SAVE_FREQ=1, DATA__BATCH_SIZE=4, **opts,
        )  # fmt: skip
        best = run(config, {'zero_optimization': {'stage': 1}})
        folder = Path(config.OUTPUT)
        last = json.loads((folder / 'metrics.jsonl').read_text().splitlines()[-1])
        results[name] = {
            'best': best,
            'last': {k: v for k, v in last.items() if k not in ('seconds', 'images_per_s')},
            'classes': config.MODEL.NUM_CLASSES,
            'log': (folder / f'log_rank{rank()}.txt').read_text(),
        }
    return results


def set_up_apart(paths: list[str]) -> str:
    """On ranks: sets up with other images on each; returns the error."""
    config = small_config(Path(paths[rank()]), MODEL__NUM_CLASSES=0, EVAL_MODE=True)
    try:
        setup(config, None, logging.getLogger('test'))
    except ConfigError as error:
        return str(error)
    return ''


def evaluate_several(data: str, batch_size: int) -> dict[str, Any]:
    """On ranks: evaluates a fixed random model on images of several labels."""
    config = small_config(
        Path(data), EVAL_MODE=True, DATA__DATASET='jsonl', DATA__MULTI_LABEL=True,
        DATA__BATCH_SIZE=batch_size, MODEL__NUM_CLASSES=4,
    )  # fmt: skip
    loader = build_loaders(config, rank(), world_size()).val
    seed_everything(0)
    model = build_model(config)
    result = evaluate(config, model, loader, torch.device('cpu'))
    return {**vars(result), **result.record(), 'told': result.told()}
