"""What ranks do in test_sharded_build.py: models built in slices, beside the same built whole."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import deepspeed
import timm
import torch
from torch import nn

from internvl_ds import load_pretrained
from internvl_ds.dist.rendezvous import rank
from internvl_ds.train.model import build_model
from internvl_ds.zero import sharded_build
from internvl_ds.zero.parameters import is_sharded, local_values
from internvl_ds.zero.sharded_build import ShardedBuild
from internvl_ds.zero.wrapper import replaced
from tests.bench.memory import peak_growth
from tests.harness.calls import message_of
from tests.harness.model import make_config
from tests.train.models import tiny

STAGE_3 = {'zero_optimization': {'stage': 3}}


class Odd(nn.Module):
    """Constructors that do to parameters what is hard to do to slices."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(700, 501), nn.Linear(501, 700, bias=False)
        self.tied = nn.Linear(501, 700, bias=False)
        self.tied.weight = self.second.weight
        self.norm, self.scale = nn.BatchNorm1d(33), nn.Parameter(torch.tensor(0.3))
        self.frozen = nn.Linear(9, 9).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Linear(600, 601) for _ in range(4))
        self.copies = nn.ModuleList(copy.deepcopy(self.first) for _ in range(2))
        self.half = nn.Linear(400, 401).bfloat16()
        self.register_buffer('table', self.first.weight[:3].detach().sum(1))
        with torch.no_grad():
            # Views of several parameters that are written to later.
            parts = [p for block in self.blocks for p in block.weight.data.chunk(3)]
            arrays = [block.bias.detach().numpy() for block in self.blocks]
            for part in parts:
                nn.init.normal_(part)
            for array in arrays:
                array += 1
            for depth, block in enumerate(self.blocks, 1):
                block.weight.div_(depth)
            self.first.weight[5:9] = self.second.weight.t()[5:9] * 2
            self.blocks[0].weight.copy_(self.blocks[1].weight + self.blocks[0].weight)
            self.blocks[2].weight.copy_(torch.flip(self.blocks[2].weight, (0,)))
        self.second.weight.data = torch.roll(self.second.weight.data, 1, 0)
        assert self.first.weight.shape == (501, 700)
        assert self.first.weight.size(1) == 700
        assert (self.norm.weight.dim(), self.first.weight.numel()) == (1, 501 * 700)
        assert isinstance(repr(self), str)
        self.apply(lambda module: isinstance(module, nn.Linear) and module.weight.mul_(1.5)
                   if not module.training else None)  # fmt: skip
        self.load_state_dict(self.state_dict())


def build(name: str) -> nn.Module:
    """A model of timm by name, `Odd`, or one whose construction loads weights from a path."""
    if name.endswith('backbone.pth'):
        return build_model(tiny.tiny_config(PRETRAINED=name, EMBED_DIM=320))
    if name.endswith('.pth'):
        model = nn.Sequential(nn.Linear(700, 300), nn.Linear(300, 40))
        load_pretrained(make_config(MODEL__PRETRAINED=name), model, logging.getLogger('test'))
        nn.init.trunc_normal_(model[1].bias)
        return model
    return Odd() if name == 'odd' else timm.create_model(name, num_classes=10)


def compare(names: list[str]) -> dict[str, Any]:
    """Whether a build in slices gives the parameters, buffers and generator of a whole one."""
    return {name: _compare(name) for name in names}


def _compare(name: str) -> dict[str, Any]:
    torch.manual_seed(3)
    whole, state = build(name), torch.get_rng_state()
    torch.manual_seed(3)
    gather, gathers = sharded_build._gather, []
    counted = replaced(
        sharded_build, '_gather', lambda p, flat: [gathers.append(p), gather(p, flat)]
    )
    with counted, ShardedBuild(STAGE_3, 0) as sharded:
        sliced = build(name)
    found = {
        'gathers': len(gathers),
        'finished': sharded.finish(sliced),
        'generator': torch.equal(torch.get_rng_state(), state),
    }
    pairs = zip(whole.named_parameters(), sliced.named_parameters(), strict=True)
    wrong, kept = [], 0
    for (key, mine), (other, its) in pairs:
        kept += local_values(its).numel()
        assert is_sharded(its)
        with deepspeed.zero.GatheredParameters([its]):
            alike = (mine.shape, mine.dtype, mine.requires_grad) == (
                its.shape, its.dtype, its.requires_grad
            )  # fmt: skip
            wrong += [] if key == other and alike and torch.equal(mine, its) else [key]
    buffers = zip(whole.named_buffers(), sliced.named_buffers(), strict=True)
    wrong += [key for (key, a), (_, b) in buffers if not torch.equal(a, b)]
    count = sum(p.numel() for p in whole.parameters())
    return {**found, 'wrong': wrong, 'kept': kept, 'all': count}


def refused() -> dict[str, str]:
    """What cannot be done to slices."""

    def resized() -> nn.Module:
        layer = nn.Linear(700, 700)
        other = nn.Linear(700, 700)
        layer.weight.data = torch.zeros(3, 3)
        return nn.ModuleList([layer, other])

    def built(make: Callable[[], nn.Module]) -> None:
        with ShardedBuild(STAGE_3, 0) as sharded:
            model = make()
        sharded.finish(model)

    return {'resized': message_of(lambda: built(resized))}


def digests() -> list[bool]:
    """Whether ranks that draw alike have one digest, and others have others."""
    found = []
    for seed in (0, rank()):
        torch.manual_seed(seed)
        with ShardedBuild(STAGE_3, 0) as sharded:
            model = nn.Linear(70, 70)
        sharded.finish(model)
        gathered: list[Any] = [None, None]
        torch.distributed.all_gather_object(gathered, sharded.digest(model))
        found.append(gathered[0] == gathered[1])
    return found


class Deep(nn.Module):
    """Blocks of one size, which are drawn again when all are there."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        for block in self.blocks:
            nn.init.trunc_normal_(block.weight, std=0.02)
            block.weight.data.mul_(0.5)


def peak(blocks: int, width: int) -> dict[str, int]:
    """Bytes of memory at the most while a model is built in slices, and while it is built whole."""
    models: list[nn.Module] = []

    def build_whole() -> None:
        models.append(Deep(blocks, width))

    def build_slices() -> None:
        with ShardedBuild(STAGE_3, 0) as sharded:
            models.append(Deep(blocks, width))
        sharded.finish(models[0])

    with ShardedBuild(STAGE_3, 0):
        Deep(2, width)  # what is imported and connected once is not counted
    Deep(2, width)
    found = {}
    for name, action in (('slices', build_slices), ('whole', build_whole)):
        found[name] = peak_growth(action)
        models.clear()
    return found
