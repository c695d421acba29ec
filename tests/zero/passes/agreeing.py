"""What ranks do in test_agreement.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from internvl_ds import NativeScalerWithGradNormCount, initialize
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.errors import ConfigError
from tests.harness.model import CLASSES, FEATURES, batch, make_config, on_device, zero_json
from tests.harness.training import whole_weights

UPDATES = 6


class Branches(nn.Module):
    """Layers of one size, of which a pass uses some, in some order."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, way: str = '') -> torch.Tensor:
        x = torch.tanh(self.stem(x))
        for turn in way:
            x = torch.tanh({'l': self.left, 'r': self.right}[turn](x))
        return self.head(x)


# Name -> the layers that ranks 0 and 1 use in each pass.
WAYS: dict[str, tuple[list[str], list[str]]] = {
    'one skips': (['l'] * UPDATES, [''] * UPDATES),
    'another layer': (['l'] * UPDATES, ['r'] * UPDATES),
    'another order': (['lr'] * UPDATES, ['rl'] * UPDATES),
    'later': (['l'] * UPDATES, ['l', 'l', 'l', 'r', 'l', 'l']),
    'after both were seen': (['l', 'r', 'l', 'r', 'l', 'r'], ['l', 'r', 'l', 'l', 'r', 'r']),
    'in turns': (['l', 'r', 'lr', 'l', 'rl', 'r'],) * 2,
}


def make() -> tuple[Branches, torch.optim.SGD]:
    torch.manual_seed(0)
    model = Branches()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def plain(name: str) -> dict[str, list[float]]:
    """The weights of plain PyTorch on the whole batches, as rank 0 goes.

    Without a gradient in an update SGD leaves a weight alone, as with one of zero.
    """
    model, optimizer = make()
    for step in range(UPDATES):
        optimizer.zero_grad()
        x, y = batch(step)
        cross_entropy(model(x, WAYS[name][0][step]), y).backward()
        optimizer.step()
    return {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}


def train(stage: int, name: str, accumulation: int = 1, manual: bool = False) -> dict[str, Any]:
    """The weights after the updates, or the error, and how many updates were applied.

    Args:
        manual: the script calls engine.backward and engine.step itself.
    """
    model, client = make()
    config = make_config(
        DATA__BATCH_SIZE=16 // accumulation // world_size(),
        TRAIN__ACCUMULATION_STEPS=accumulation,
        COMM__TIMEOUT=10,
    )
    engine, optimizer = initialize(config, model, client, zero_json(stage))
    scaler = NativeScalerWithGradNormCount()
    size = 16 // accumulation // world_size()
    try:
        for step in range(UPDATES):
            x, y = on_device(*batch(step))
            for micro in range(accumulation):
                start = (micro * world_size() + rank()) * size
                part = slice(start, start + size)
                loss = cross_entropy(engine(x[part], way=WAYS[name][rank()][step]), y[part])
                if manual:
                    engine.backward(loss)
                    engine.step()
                else:
                    is_boundary = micro == accumulation - 1
                    scaler(loss / accumulation, optimizer, update_grad=is_boundary)
    except ConfigError as error:
        if name == 'later':
            raise
        return {'error': str(error), 'updates': engine.global_steps}
    return {n: value.flatten().tolist() for n, value in whole_weights(engine).items()}
