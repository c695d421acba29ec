"""The ds_configs and YAML files that ship: each has its row, resolves, and trains right."""

from __future__ import annotations

import math
import re
from argparse import Namespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import config as deepspeed_config

from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.ds.check import check
from internvl_ds.config.ds.load import load_ds_config, shipped_dir
from internvl_ds.config.tree import find_config_file, get_config
from internvl_ds.engine.registry import _refuse_unsupported
from internvl_ds.errors import ConfigError
from internvl_ds.train.model import build_model
from tests.config.ds import shipping
from tests.engine.test_grad_scaler import tolerances
from tests.harness.model import make_config, make_model, trained
from tests.harness.plain_loop import reference
from tests.harness.ranks import run_ranks

NAMES = sorted(path.stem for path in shipped_dir().glob('*.json'))
YAMLS = sorted(find_config_file('digits_quickstart').parent.glob('*.yaml'))

# AMP_OPT_LEVEL and AMP_TYPE -> the precision that they ask for; '' leaves it to the ds_config.
LEVELS = {
    ('O0', 'float16'): 'fp32',
    ('O1', 'float16'): 'autocast_fp16',
    ('O1', 'bfloat16'): 'autocast_bf16',
    ('O2', 'float16'): 'fp16',
    ('O2', 'bfloat16'): 'bf16',
}
CONSTANTS = {
    'fp32': ds.FP32,
    'bf16': ds.BF16,
    'fp16': ds.FP16,
    'autocast_bf16': ds.AUTOCAST_BF16,
    'autocast_fp16': ds.AUTOCAST_FP16,
}
# InternViT-6B from its width: patches, positions and class token; in a block 12 square matrices
# and 12 vectors: 2 norms, 2 of queries and keys, 2 layer scales, and biases of 1, 4 and 1.
SIX_B_HEAD = 2 * 6400 + 6400 * 1000 + 1000
SIX_B = 3200 * (3 * 14 * 14 + 1 + 257 + 1) + 48 * (12 * 3200**2 + 12 * 3200) + SIX_B_HEAD
RECIPES = ('intern_vit_6b_224_linear_probe', 'vit_intern300m_448_finetune')


def stated(name: str) -> str | None:
    """The precision that a file states; None where it leaves that to the yacs configuration."""
    return 'bf16' if name in RECIPES else None


def stage(name: str) -> int:
    return int(name[4]) if name.startswith('zero') else {RECIPES[0]: 1, RECIPES[1]: 2}[name]


@pytest.fixture
def fp16_engine(monkeypatch):
    """Has DeepSpeed believe that this device has an fp16 engine, as GPUs do."""
    monkeypatch.setattr(get_accelerator(), 'is_fp16_supported', lambda: True)


def accept(monkeypatch, resolved: dict, world_size: int) -> None:
    """Raises where the bridge, or DeepSpeed's own parser on so many ranks, refuses it."""
    monkeypatch.setattr(deepspeed_config.dist, 'get_rank', lambda: 0)
    monkeypatch.setattr(deepspeed_config.dist, 'get_world_size', lambda: world_size)
    _refuse_unsupported(resolved)
    parsed = deepspeed_config.DeepSpeedConfig(resolved)
    assert parsed.world_size == world_size
    assert parsed.train_batch_size == resolved['train_batch_size']


def test_every_stage_ships():
    assert {f'zero{n}' for n in range(4)} <= set(NAMES)


def test_every_file_has_its_row_in_the_readme():
    text = (shipped_dir() / 'README.md').read_text()
    rows = [line for line in text.splitlines() if line.startswith('|')]
    named = [name for row in rows for name in re.findall(r'`([\w-]+)\.json`', row)]
    assert sorted(named) == NAMES


@pytest.mark.parametrize('name', NAMES)
def test_a_file_resolves_at_every_level_that_it_supports(name, monkeypatch, fp16_engine):
    tree = load_ds_config(name)
    for (level, amp_type), asked in LEVELS.items():
        config = make_config(AMP_OPT_LEVEL=level, AMP_TYPE=amp_type, DATA__BATCH_SIZE=4)
        # AMP_TYPE's default, float16, gives way to a bf16 that the ds_config states
        wanted = {asked, asked.replace('fp16', 'bf16') if amp_type == 'float16' else asked}
        if stated(name) is not None and stated(name) not in wanted:
            with pytest.raises(ConfigError, match='asks for'):
                ds.resolve_or_raise(tree, config, 2)
            continue
        for world_size in (1, 2, 8):
            resolved = ds.resolve_or_raise(tree, config, world_size)
            assert resolved['train_batch_size'] == 4 * world_size
            assert resolved['zero_optimization']['stage'] == stage(name)
            assert ds.precision_of(resolved) == CONSTANTS[stated(name) or asked]
            accept(monkeypatch, resolved, world_size)
            evaluating = ds.for_inference(resolved)
            assert evaluating['zero_optimization']['stage'] in (0, 3)
            assert check(evaluating, config, world_size, optimizer_in_code=False) == []


@pytest.mark.parametrize('name', [name for name in NAMES if stated(name)])
def test_a_file_that_states_its_precision_decides_where_yacs_leaves_it_open(name):
    resolved = ds.resolve_or_raise(load_ds_config(name), make_config(AMP_OPT_LEVEL=''), 2)
    assert ds.precision_of(resolved) == CONSTANTS[stated(name)]


@pytest.mark.parametrize('path', YAMLS, ids=lambda path: path.stem)
def test_a_yaml_goes_with_the_ds_config_that_it_names(path, monkeypatch):
    (name,) = set(re.findall(r'--deepspeed_config (\w+)', path.read_text()))
    config = get_config(Namespace(cfg=path.stem))
    resolved = ds.resolve_or_raise(load_ds_config(name), config, 8)
    assert ds.precision_of(resolved) == ds.BF16
    accept(monkeypatch, resolved, 8)


@pytest.mark.parametrize(
    ('name', 'parameters', 'trained', 'images'),
    [(RECIPES[0], SIX_B, SIX_B_HEAD, 1024), (RECIPES[1], 305_037_288, 305_037_288, 1024)],
)
def test_a_recipe_builds_what_it_says(name, parameters, trained, images):
    config = get_config(Namespace(cfg=name))
    with torch.device('meta'):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    resolved = ds.resolve_or_raise(load_ds_config(name), config, 8)
    assert resolved['train_batch_size'] == images


def test_the_6b_recipe_takes_published_weights_of_the_backbone(tmp_path):
    sizes = {'EMBED_DIM': 48, 'DEPTH': 2, 'NUM_HEADS': 3, 'PRETRAINED': str(tmp_path / 'own.pth')}
    opts = [word for k, v in sizes.items() for word in (f'MODEL.INTERN_VIT_6B.{k}', str(v))]
    source = build_model(get_config(Namespace(cfg=RECIPES[0], opts=opts[:-2])))
    state = {key: torch.randn_like(source.state_dict()[key]) for key in source.backbone_keys}
    torch.save({'module': state}, tmp_path / 'own.pth')

    model = build_model(get_config(Namespace(cfg=RECIPES[0], opts=opts)))

    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        'norm.weight', 'norm.bias', 'head.weight', 'head.bias',
    ]  # fmt: skip


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
def test_every_file_trains_right_on_two_ranks(tmp_path):
    cells = [(name, 'bf16') for name in trained(NAMES)]
    cells += [(f'zero{n}', p) for n in range(4) for p in CONSTANTS if p != 'bf16']
    # One process trains with all: what it was told of an fp16 engine, and DeepSpeed of autocast,
    # stays, so those that need neither come first.
    cells.sort(key=lambda cell: list(CONSTANTS).index(cell[1]))
    results = run_ranks(shipping.train_with_each, 2, tmp_path, cells=cells, steps=2, accumulation=2)
    start = {n: p.detach().flatten() for n, p in make_model().named_parameters()}
    expected = {precision: reference(precision, 2, None) for precision in CONSTANTS}
    for result in results:
        for (name, precision), got in zip(cells, result, strict=True):
            wanted = expected[precision]
            norm, way = tolerances(precision)
            assert got['norms'] == pytest.approx(wanted['norms'], rel=norm), (name, precision)
            gone, off = 0.0, 0.0
            for key, values in got['weights'].items():
                reached = torch.tensor(wanted['weights'][key])
                gone += float((reached - start[key]).square().sum())
                off += float((reached - torch.tensor(values)).square().sum())
            # one element whose gradient is near zero may go the other way: a step of Adam's
            assert math.sqrt(off) <= way * math.sqrt(gone) + 1e-2, (name, precision)
