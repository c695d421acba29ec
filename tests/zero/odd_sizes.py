"""What ranks do in test_odd_sizes.py."""

from __future__ import annotations

import torch
from torch import nn

from internvl_ds import NativeScalerWithGradNormCount, initialize
from internvl_ds.dist.rendezvous import world_size
from tests.engine.stepping import train_step
from tests.harness.model import Net, make_config, precision_values, zero_json
from tests.harness.training import whole_weights


class Scaled(Net):
    """With a parameter of one element, of which all ranks but the first have padding."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain


def train(precision: str) -> dict[str, dict[str, list[float]]]:
    """Weights by stage: a group of one element, buckets smaller than most parameters."""
    return {str(stage): _train(stage, precision) for stage in range(4)}


def _train(stage: int, precision: str) -> dict[str, list[float]]:
    config = make_config(
        DATA__BATCH_SIZE=8 // world_size(), TRAIN__ACCUMULATION_STEPS=2,
        **precision_values(precision),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Scaled()
    rest = [p for n, p in model.named_parameters() if p.requires_grad and n != 'gain']
    client = torch.optim.SGD([{'params': rest}, {'params': [model.gain], 'lr': 0.05}], lr=0.1)
    json = zero_json(stage)
    json['zero_optimization']['reduce_bucket_size'] = 50
    engine, optimizer = initialize(config, model, client, json)
    scaler = NativeScalerWithGradNormCount()
    for step in range(3):
        train_step(engine, optimizer, scaler, step, 0.5, 2)
    weights = whole_weights(engine)
    engine.destroy()
    return {name: weights[name].flatten().tolist() for name in weights}


def destroy(stages: list[int], precision: str) -> str:
    """Makes engines without an optimizer, and ends them."""
    for stage in stages:
        config = make_config(DATA__BATCH_SIZE=8, **precision_values(precision))
        engine, _ = initialize(config, Net(), None, zero_json(stage))
        engine.destroy()
    return 'no error'
