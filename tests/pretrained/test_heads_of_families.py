"""Fine-tuning with another class count, for a model of each of timm's families."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from internvl_ds.config.tree import default_config
from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained import convert_22k_head_to_1k, imagenet_22k_rows, load_pretrained
from internvl_ds.pretrained.report import PretrainedReport
from tests.harness.counts import share
from tests.pretrained.families import build, families

_log = logging.getLogger('test_pretrained')
_KINDS = ('pth', 'safetensors')
_REBUILT = ('relative_position_index', 'relative_coords_table', 'attn_mask')


def _load(path: Path, model: nn.Module, rand_init: bool = True) -> PretrainedReport:
    config = default_config()
    config.MODEL.PRETRAINED = str(path)
    config.TRAIN.RAND_INIT_FT_HEAD = rand_init
    return load_pretrained(config, model, _log)


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Random values for each entry of a model without memory; the same ones for the same tensor."""
    values: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in values:
            empty = torch.empty_like(tensor, device='cpu', requires_grad=False)
            floating = empty.is_floating_point()
            values[id(tensor)] = empty.uniform_() if floating else empty.fill_(3)
    return {key: values[id(tensor)] for key, tensor in state.items()}


def _write(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == '.safetensors':  # which holds no tensor twice
        save_file({key: value.clone() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def _fine_tune(state: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    """Loads a file of 7 classes into a model of 5, and compares all that is in it then."""
    head = {key for key, t in model.state_dict().items() if t.shape != state[key].shape}
    assert head, 'no tensor depends on the classes'
    with torch.no_grad():
        before = {key: model.state_dict()[key].uniform_(0.5, 1).clone() for key in head}
    with pytest.raises(PretrainedError, match=r'MODEL\.NUM_CLASSES .* TRAIN\.RAND_INIT_FT_HEAD'):
        _load(path, model, rand_init=False)
    report = _load(path, model)
    rebuilt = {key for key in report.missing if any(word in key for word in _REBUILT)}
    assert set(report.missing) - rebuilt == head
    assert not report.unexpected
    assert report.matched == 1
    assert any("the model's own is scaled by 0.001" in note.text for note in report.notes)
    for key, value in model.state_dict().items():
        if key not in rebuilt:
            assert value.equal(before[key] * 0.001 if key in head else state[key]), key


@pytest.mark.slow
@pytest.mark.soak
def test_a_model_of_every_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done, skipped, failed = 0, [], []
    for number, (family, name, settings) in enumerate(share(families(), 3)):
        try:
            saved, model = build(name, 7, settings), build(name, 5, settings)
        except Exception as error:
            skipped.append(f'{family}: {name} does not build: {type(error).__name__}: {error}')
            continue
        state, model = _values(saved), model.to_empty(device='cpu')
        # Both kinds of a few, which are small.
        kinds = _KINDS if name.startswith('test_') else (_KINDS[number % 2],)
        try:
            for kind in kinds:
                path = _write(state, tmp_path / f'{family}.{kind}')
                _fine_tune(state, model, path)
                path.unlink()
            done += 1
        except (AssertionError, PretrainedError, pytest.fail.Exception) as error:
            failed.append(f'{family}: {name}: {error}')
    with capsys.disabled():
        print(f'\n{done} families fine-tune with another class count', *skipped, sep='\n')
    assert not failed, '\n'.join(failed)
    assert len(skipped) <= done / 10, skipped


# A Linear in a head of several layers, a convolution, and one that was distilled.
_MODELS = {
    'head.fc': ('test_convnext', {}),
    'fc': ('dla46x_c', {}),
    'head, head_dist': ('deit_tiny_distilled_patch16_224', {'depth': 1, 'embed_dim': 48}),
}


@pytest.mark.parametrize('layers', _MODELS)
def test_22k_rows_of(tmp_path: Path, layers: str) -> None:
    name, settings = _MODELS[layers]
    state = _values(build(name, 21841, settings))
    model = build(name, 1000, settings).to_empty(device='cpu')
    report = _load(_write(state, tmp_path / 'w.pth'), model, rand_init=False)
    rows = imagenet_22k_rows()
    for key, value in model.state_dict().items():
        owner = key.rpartition('.')[0]
        assert value.equal(state[key][rows] if owner in layers.split(', ') else state[key]), key
    texts = [note.text for note in report.notes]
    assert texts == [
        f'{layer} 21841 -> 1000: took its ImageNet-1K rows' for layer in layers.split(', ')
    ]


@pytest.mark.parametrize('layers', _MODELS)
def test_a_cut_22k_head_of(layers: str) -> None:
    name, settings = _MODELS[layers]
    saved = build(name, 21841, settings)
    state, model = _values(saved), saved.to_empty(device='cpu')
    model.load_state_dict(state)
    assert convert_22k_head_to_1k(model, _log) is model
    for key, value in model.state_dict().items():
        is_head = key.rpartition('.')[0] in layers.split(', ')
        assert value.equal(state[key][imagenet_22k_rows()] if is_head else state[key]), key
    for layer in map(model.get_submodule, layers.split(', ')):
        assert '1000,' in repr(layer)


@pytest.mark.parametrize('layers', _MODELS)
@pytest.mark.parametrize('rand_init', [False, True])
def test_a_model_without_a_head(tmp_path: Path, layers: str, rand_init: bool) -> None:
    name, settings = _MODELS[layers]
    state = _values(build(name, 7, settings))
    model = build(name, 0, settings).to_empty(device='cpu')
    report = _load(_write(state, tmp_path / 'w.pth'), model, rand_init)
    assert {key.rpartition('.')[0] for key in report.unexpected} == set(layers.split(', '))
    assert not report.missing
    for key, value in model.state_dict().items():
        assert value.equal(state[key]), key
