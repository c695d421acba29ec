"""Images whose colour is a class, a model that reads it, and a plain loop over all of them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor
from yacs.config import CfgNode

from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.initialize import initialize
from internvl_ds.errors import InternvlDsError
from internvl_ds.train.data import build_loaders, start_epoch
from internvl_ds.train.evaluate import evaluate
from internvl_ds.train.model import build_model
from tests.harness.training import small_config


def colour(label: int) -> tuple[int, int, int]:
    """Of one of 1000 classes: 8 steps apart from its neighbours'."""
    return 8 * (label % 32), 8 * (label // 32), 0


def write_image(path: Path, label: int) -> Path:
    """An image of 16 x 16 pixels that `Colours` takes for a class, exactly where it is a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (16, 16), colour(label)).save(path)
    return path


def write_variant(root: Path, labels: Mapping[str, int], suffix: str = '.png') -> Path:
    """A folder for each class, with an image that is right, one that is nearly, and one not."""
    for folder, label in labels.items():
        for number, shown in enumerate((label, (label + 1) % 1000, (label + 500) % 1000)):
            write_image(root / folder / f'{number}{suffix}', shown)
    return root


class Colours(nn.Module):
    """The nearest colour among those of 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.tensor([colour(label) for label in range(1000)]) / 255
        self.head = nn.Linear(3, 1000)
        with torch.no_grad():
            self.head.weight.copy_(2 * codes)
            self.head.bias.copy_(-codes.square().sum(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.mean((2, 3)))


def colours(config: CfgNode) -> nn.Module:
    """For MODEL.FACTORY."""
    return Colours()


def variant_config(path: Path, dataset: str, **values: Any) -> CfgNode:
    """Evaluates `Colours` on a data set."""
    return small_config(
        path, **{
            'DATA__DATASET': dataset, 'MODEL__NUM_CLASSES': 1000, 'EVAL_MODE': True,
            'MODEL__FACTORY': f'{__name__}:colours', 'AUG__MEAN': [0.0] * 3, 'AUG__STD': [1.0] * 3,
            **values,
        },
    )  # fmt: skip


def plain_result(
    images: Iterable[tuple[Path, int, set[int]]], columns: list[int] | None = None
) -> dict[str, float]:
    """Counts over images one by one, with nothing of the package.

    Args:
        images: path, the label that the loss is of, and the labels that are right; none: the image
            does not count for the accuracies.
        columns: the only labels that there are.
    """
    model, columns = Colours(), columns or list(range(1000))
    first, five, losses = [], [], []
    for path, label, right in images:
        with torch.no_grad():
            logits = model(to_tensor(Image.open(path).convert('RGB'))[None])[0][columns]
        place = torch.tensor(columns.index(label))
        losses.append(nn.functional.cross_entropy(logits, place).item())
        if right:
            top = [columns[index] for index in logits.topk(5).indices.tolist()]
            first.append(top[0] in right)
            five.append(bool(right & set(top)))
    counts = {'count': len(losses), 'labelled': len(first)}
    means = 100 * sum(first) / len(first), 100 * sum(five) / len(five), sum(losses) / len(losses)
    return {**dict(zip(('acc1', 'acc5', 'loss'), means, strict=True)), **counts}


def zip_folder(
    folder: Path, archive: Path, compression: int = zipfile.ZIP_STORED, inside: str = ''
) -> Path:
    """Puts the images below a folder into a zip file, under a name in it."""
    with zipfile.ZipFile(archive, 'w', compression) as target:
        for path in sorted(folder.rglob('*.png')):
            target.write(path, f'{inside}{path.relative_to(folder)}')
    return archive


def evaluate_all(cases: list[list[Any]]) -> list[dict[str, float]]:
    """On ranks: evaluates each (path, data set, further settings) through an engine of stage 3."""
    engine, results = None, []
    for path, dataset, values in cases:
        config = variant_config(Path(path), dataset, **values)
        if engine is None:
            stage = {'zero_optimization': {'stage': 3}}
            engine, _ = initialize(config, build_model(config), None, stage)
        loader = build_loaders(config, rank(), world_size()).val
        results.append(vars(evaluate(config, engine, loader, engine.device)))
    return results


def epochs_of_parts(data: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """On ranks: what this rank reads in two epochs, and from the middle of the second on."""
    results = []
    for values in cases:
        config = small_config(Path(data), AUG__REPROB=0.5, **values)
        read: dict[str, Any] = {}
        for epoch, done in ((0, 0), (1, 0), (1, 1)):
            loader = build_loaders(config, rank(), world_size()).train
            start_epoch(loader, 0, epoch, rank(), micro_batches=done)
            batches = list(loader)
            read[f'{epoch} after {done}'] = {
                'images': [draw.image for draw in loader.sampler],
                'sums': [float(image.double().sum()) for images, _ in batches for image in images],
            }
        results.append(read)
    return results


def error_of(config: CfgNode) -> str:
    """What building the loaders says."""
    try:
        build_loaders(config, 0, 1)
    except InternvlDsError as error:
        return f'{type(error).__name__}: {error}'
    return ''


def line_of(config: CfgNode) -> str:
    """The error of building the loaders, which is one line."""
    said = error_of(config)
    assert said.startswith('ConfigError: ')
    assert '\n' not in said
    return said.removeprefix('ConfigError: ')
