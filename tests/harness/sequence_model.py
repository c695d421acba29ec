"""The model of test_sequences.py, and what trains it; the same in the ranks and the plain loop."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from tests.harness.model import CLASSES, FEATURES

CLIP = 0.5
PARTS = ('stem', 'norm', 'body', 'tied', 'scale', 'head')  # the head is trained always

# With this eps a step is smooth in the gradient: where that is near zero, the rounding of its sum
# over the ranks is not divided by itself.
_EPS = 1e-2
OPTIMIZERS: dict[str, Any] = {
    'sgd': lambda groups: torch.optim.SGD(groups, lr=0.05),
    'momentum': lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    'adamw': lambda groups: torch.optim.AdamW(groups, lr=0.02, eps=_EPS),
    'amsgrad': lambda groups: torch.optim.AdamW(groups, lr=0.02, eps=_EPS, amsgrad=True),
    'adamax': lambda groups: torch.optim.Adamax(groups, lr=0.02, eps=_EPS),
    'rmsprop': lambda groups: torch.optim.RMSprop(groups, lr=0.02, eps=_EPS, momentum=0.5),
}


class Net(nn.Module):
    """Parts to freeze, a tied weight, buffers of both kinds, sizes that divide by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 7)
        self.norm = nn.LayerNorm(7)
        self.body = nn.Linear(7, 7)
        self.tied = nn.Linear(7, 7, bias=False)
        self.again = nn.Linear(7, 7, bias=False)
        self.again.weight = self.tied.weight
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.head = nn.Linear(7, CLASSES)
        self.register_buffer('seen', torch.zeros(()))
        self.register_buffer('offset', torch.linspace(-0.1, 0.1, 7), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        x = torch.tanh(self.norm(self.stem(x)) + self.offset.to(x.dtype))
        x = self.again(torch.tanh(self.tied(x + torch.tanh(self.body(x)))))
        return self.head(torch.tanh(x) * self.scale)


def make_net(seed: int, trained: list[str]) -> Net:
    """A model in which these parts require a gradient; the generator's state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)
    return net


def part_of(name: str) -> str:
    return name.split('.')[0]


def toggle(net: Net, part: str, on: bool) -> None:
    """Unfreezes a part, or freezes it."""
    for name, parameter in net.named_parameters():
        if part_of(name) == part:
            parameter.requires_grad_(on)


def make_client(kind: str, named: dict[str, torch.Tensor]) -> torch.optim.Optimizer:
    """An optimizer with a group for each tensor, of four settings, as the original builds them."""
    client = OPTIMIZERS[kind]([{'params': [p], 'name': n} for n, p in named.items()])
    for group in client.param_groups:
        group['weight_decay'] = 0.0 if group['params'][0].dim() == 1 else 0.05
        group['lr'] *= 0.5 if part_of(group['name']) in ('stem', 'norm') else 1.0
    return client


def settings_of(name: str, tensor: torch.Tensor) -> tuple[bool, bool]:
    """What decides which group a parameter is in, once those of equal settings are one."""
    return tensor.dim() == 1, part_of(name) in ('stem', 'norm')


def make_scheduler(client: torch.optim.Optimizer) -> CosineLRScheduler:
    return CosineLRScheduler(
        client, t_initial=60, warmup_t=3, warmup_lr_init=2e-3, t_in_epochs=False
    )
