"""Models, checkpoints and what ranks do in the tests of pretrained weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from internvl_ds import (
    NativeScalerWithGradNormCount,
    convert_22k_head_to_1k,
    initialize,
    load_pretrained,
    save_checkpoint,
)
from internvl_ds.dist.process_group import init_distributed
from internvl_ds.dist.rendezvous import rank, world_size
from internvl_ds.engine.ema import ShardedEma
from tests.engine.stepping import masters, train_step
from tests.harness.calls import message_of
from tests.harness.model import (
    make_config,
    make_model,
    make_optimizer,
    on_device,
    precision_values,
    zero_json,
)

_log = logging.getLogger('pretraining')


class Block(nn.Module):
    """With a table over a window that it says."""

    def __init__(self, dim: int, window: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.window_size = window
        self.proj = nn.Linear(dim, dim)
        rows, columns = (2 * side - 1 for side in window)
        self.relative_position_bias_table = nn.Parameter(torch.randn(rows * columns, heads))
        self.register_buffer('relative_position_index', torch.arange(rows))


class Swin(nn.Module):
    """The shapes of a windowed transformer, sizes that divide by nothing, and a BatchNorm."""

    def __init__(
        self, classes: int = 5, window: tuple[int, int] = (2, 2), grid: int = 4, heads: int = 3
    ) -> None:
        super().__init__()
        self.absolute_pos_embed = nn.Parameter(torch.randn(1, grid * grid, 7))
        self.blocks = nn.ModuleList(Block(7, window, heads) for _ in range(2))
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block.proj(x) * block.relative_position_bias_table.mean()
        return self.head(self.norm(x + self.absolute_pos_embed.mean(1)))


def vit(size: int = 56, patch: int = 14, classes: int = 5, **more: Any) -> nn.Module:
    """timm's InternViT-300M in small."""
    return timm.create_model(
        'vit_intern300m_patch14_448', img_size=size, patch_size=patch, depth=2, embed_dim=32,
        num_heads=4, num_classes=classes, **more,
    )  # fmt: skip


def _resnet(classes: int) -> nn.Module:
    return timm.create_model('test_resnet', num_classes=classes)


def hugging_face_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An InternViT as OpenGVLab publishes it, inside a chat model."""
    names = {
        'cls_token': 'embeddings.class_embedding',
        'pos_embed': 'embeddings.position_embedding',
        'patch_embed.proj.weight': 'embeddings.patch_embedding.weight',
        'patch_embed.proj.bias': 'embeddings.patch_embedding.bias',
    }
    found = {}
    for key, value in state.items():
        if key.startswith('head.'):
            continue
        name = names.get(key, key.replace('blocks.', 'encoder.layers.').replace('.gamma', ''))
        found[f'vision_model.{name}'] = value
    return found


def _student(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {'teacher.x': torch.zeros(3), **{f'student.{k}': v for k, v in state.items()}}


# name -> (the model that was saved, what becomes of its state, the model to load, yacs values)
Case = tuple[Callable[[], nn.Module], Callable[..., Any], Callable[[], nn.Module], dict[str, Any]]
CASES: dict[str, Case] = {
    'same': (Swin, lambda s: {'model': s}, Swin, {}),
    'student': (Swin, _student, Swin, {}),
    'prefix': (Swin, lambda s: {f'module.backbone.{k}': v for k, v in s.items()}, Swin, {}),
    'sizes': (Swin, dict, lambda: Swin(window=(3, 4), grid=6), {}),
    'half': (lambda: Swin().half(), dict, lambda: Swin(window=(3, 3)), {}),
    'rescaled head': (
        lambda: Swin(classes=7), dict, Swin, {'TRAIN__RAND_INIT_FT_HEAD': True}
    ),
    'rescaled fc': (
        lambda: _resnet(7), dict, lambda: _resnet(5), {'TRAIN__RAND_INIT_FT_HEAD': True}
    ),
    '22k rows of fc': (lambda: _resnet(21841), dict, lambda: _resnet(1000), {}),
    '22k rows': (lambda: Swin(classes=21841), dict, lambda: Swin(classes=1000), {}),
    'renamed': (
        Swin,
        lambda s: {k.replace('blocks', 'layers'): v for k, v in s.items()},
        Swin,
        {'MODEL__PRETRAINED_RENAME': [(r'^layers\.', 'blocks.')]},
    ),
    'hugging face': (vit, hugging_face_names, lambda: vit(84), {}),
    'patches': (vit, dict, lambda: vit(64, 16), {}),
}  # fmt: skip


def write_case(name: str, folder: Path) -> Path:
    """The checkpoint of a case as a .pth file."""
    make, change, _, _ = CASES[name]
    torch.manual_seed(1)
    path = folder / f'{name.replace(" ", "_")}.pth'
    torch.save(change(make().state_dict()), path)
    return path


def write_sources(folder: Path) -> dict[str, str]:
    """The same weights in every kind of file."""
    torch.manual_seed(1)
    state = Swin().state_dict()
    torch.save({'model': state}, folder / 'zip.pth')
    torch.save(state, folder / 'legacy.pth', _use_new_zipfile_serialization=False)
    save_file(state, folder / 'one.safetensors')
    paths = {name: str(folder / name) for name in ('zip.pth', 'legacy.pth', 'one.safetensors')}
    keys = list(state)
    for kind, save in (('safetensors', save_file), ('bin', torch.save)):
        part = folder / kind
        part.mkdir()
        files = {f'{i}-of-2.{kind}': keys[i::2] for i in range(2)}
        for file, held in files.items():
            save({key: state[key] for key in held}, part / file)
        places = {key: file for file, held in files.items() for key in held}
        (part / f'model.{kind}.index.json').write_text(json.dumps({'weight_map': places}))
        paths[kind] = str(part)
    return paths


def _under_zero_init(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    init_distributed()
    # By the config: on a device without fp16, DeepSpeed 0.19.8 takes bfloat16 for any dtype=.
    config = {
        'train_micro_batch_size_per_gpu': 1,
        'zero_optimization': {'stage': 3},
        'bf16': {'enabled': dtype == torch.bfloat16},
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        torch.manual_seed(2)
        return make()


def _gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state, and that no rank held it before."""
    parameters = list(model.parameters())
    assert all(p.numel() == 0 for p in parameters)
    with deepspeed.zero.GatheredParameters(parameters):
        return {name: t.detach().clone() for name, t in model.state_dict().items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def compare_with_plain(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loads into a plain module and into one built under zero.Init; whether they are the same."""
    return [_compare(**job) for job in jobs]


def _compare(
    path: str, case: str, readers: str, dtype: str = 'float32', ema: bool = False
) -> dict[str, Any]:
    _, _, make, values = CASES[case]
    config = make_config(
        MODEL__PRETRAINED=path, MODEL__PRETRAINED_READERS=readers, MODEL__PRETRAINED_EMA=ema,
        **values,
    )  # fmt: skip
    torch.manual_seed(2)
    plain = make().to(getattr(torch, dtype))
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    config_all = make_config(**values, MODEL__PRETRAINED=path, MODEL__PRETRAINED_EMA=ema)
    whole = load_pretrained(config_all, plain, _log)
    partitioned = _under_zero_init(make, getattr(torch, dtype))
    start = _gathered(partitioned)
    random = torch.get_rng_state()
    report = load_pretrained(config, partitioned, _log)
    # timm's own initialisation does nothing under zero.Init, so what is not loaded may differ.
    scaled = set(report.missing) if 'TRAIN__RAND_INIT_FT_HEAD' in values else set()
    touched, got = scaled | set(report.loaded), _gathered(partitioned)
    return {
        'same': _same(
            {k: v for k, v in got.items() if k in touched},
            {k: v for k, v in plain.state_dict().items() if k in touched},
        ),
        'rest': all(torch.equal(got[k], start[k]) for k in got.keys() - touched),
        'changed': not _same(before, plain.state_dict()),
        'reports': report == whole,
        'matched': report.matched,
        'random': torch.equal(random, torch.get_rng_state()),
    }


def save_tags(root: str) -> None:
    """Tags of every stage, each with an average, of a Swin that has trained a little."""
    for stage in range(4):
        config = make_config(f'{root}/{stage}', DATA__BATCH_SIZE=8)
        torch.manual_seed(1)
        model = Swin()
        engine, optimizer = initialize(config, model, make_optimizer(model), zero_json(stage))
        ema, scaler = ShardedEma(engine, 0.5), NativeScalerWithGradNormCount()
        generator = torch.Generator().manual_seed(rank())
        for _ in range(3):
            loss = engine(on_device(torch.randn(8, 7, generator=generator))).square().mean()
            scaler(loss, optimizer)
            ema.update()
        save_checkpoint(config, 0, engine, 0.0, optimizer, None, scaler, _log, model_ema=ema)
        engine.destroy()


def convert_partitioned() -> dict[str, Any]:
    """A 22K head cut to 1K, whole and under zero.Init."""
    torch.manual_seed(2)
    plain = Swin(classes=21841)
    plain.head.bias.requires_grad_(False)
    convert_22k_head_to_1k(plain, _log)
    partitioned = _under_zero_init(lambda: Swin(classes=21841), torch.float32)
    partitioned.head.bias.requires_grad_(False)
    convert_22k_head_to_1k(partitioned, _log)
    head = partitioned.head
    return {
        'same': _same(_gathered(partitioned), plain.state_dict()),
        'shape': list(head.weight.ds_shape),
        'slice': head.weight.ds_tensor.ds_numel,
        'trained': [head.weight.requires_grad, head.bias.requires_grad, head.out_features],
    }


def train_after(path: str) -> list[list[float]]:
    """Norms of three updates at stage 3: from a plain module, and from one under zero.Init."""
    found = []
    for partitioned in (False, True):
        config = make_config(DATA__BATCH_SIZE=8, MODEL__PRETRAINED=path)
        torch.manual_seed(2)
        model = _under_zero_init(Swin, torch.float32) if partitioned else Swin()
        load_pretrained(config, model, _log)
        client = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, optimizer = initialize(config, model, client, {'zero_optimization': {'stage': 3}})
        scaler = NativeScalerWithGradNormCount()
        generator = torch.Generator().manual_seed(rank())
        norms = []
        for _ in range(3):
            loss = engine(on_device(torch.randn(8, 7, generator=generator))).square().mean()
            norms.append(float(scaler(loss, optimizer)))
        found.append(norms)
        engine.destroy()
    return found


def load_into_engines(path: str, pairs: list[tuple[int, str]]) -> dict[str, Any]:
    """Weights loaded before the engine is made, and into one that is; then two updates of each."""
    found = {}
    for stage, precision in pairs:
        seen = []
        for target in ('before', 'engine', 'module'):
            config = make_config(
                DATA__BATCH_SIZE=8, MODEL__PRETRAINED=path, **precision_values(precision),
                MODEL__PRETRAINED_READERS='one' if target == 'module' else 'all',
            )  # fmt: skip
            model = make_model(rank())
            if target == 'before':
                load_pretrained(config, model, _log)
            engine, optimizer = initialize(config, model, make_optimizer(model), zero_json(stage))
            if target != 'before':
                report = load_pretrained(config, getattr(engine, target, engine), _log)
                assert not report.missing
            scaler = NativeScalerWithGradNormCount()
            before = masters(engine)
            norms = [float(train_step(engine, optimizer, scaler, step)[0]) for step in range(2)]
            seen.append([before, norms, masters(engine)])
            refusal = message_of(lambda: load_pretrained(config, engine.module, _log))
            engine.destroy()
        key = f'{stage} {precision}'
        found[key] = [seen[1] == seen[0], seen[2] == seen[0], seen[0][0] != seen[0][2], refusal]
    return found


def disagree(path: str, other: str, missing: str) -> list[str]:
    """Ranks of which one has another file, or none."""
    texts = []
    for theirs in (other, missing):
        model = _under_zero_init(Swin, torch.float32)
        config = make_config(MODEL__PRETRAINED=path if rank() == 0 else theirs)
        try:
            load_pretrained(config, model, _log)
            texts.append('no error')
        except Exception as error:
            texts.append(f'{type(error).__name__}: {error}')
    assert world_size() > 1
    return texts
