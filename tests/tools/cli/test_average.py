"""internvl-ds ckpt average: tags of every ZeRO stage and files, against an average by hand."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl_ds import initialize
from internvl_ds.checkpoint.sources.classes import saved_classes
from internvl_ds.checkpoint.sources.weight_files import open_file
from internvl_ds.tools.cli import main
from internvl_ds.train.model import build_model
from internvl_ds.utils import NativeScalerWithGradNormCount, save_checkpoint
from tests.harness.ranks import run_ranks
from tests.harness.training import Brightness, small_config, whole_weights


def _state(seed, steps=3):
    torch.manual_seed(seed)
    model = Brightness(4)
    torch.nn.init.normal_(model.norm.running_mean)
    model.norm.num_batches_tracked += steps
    return model.state_dict()


def _by_hand(states):
    return {
        name: torch.stack([state[name].double() for state in states])
        .sum(0)
        .div(len(states))
        .float()
        for name in states[0]
    }


@pytest.fixture
def files(tmp_path):
    """A plain .pth, one as data parallel saves it, and a .safetensors in float64; their states."""
    states = [_state(0), _state(1), _state(2)]
    states[2] = {n: t.double() if t.is_floating_point() else t for n, t in states[2].items()}
    paths = [tmp_path / name for name in ('a.pth', 'b.pth', 'c.safetensors')]
    torch.save({'model': states[0], 'class_names': list('wxyz')}, paths[0])
    torch.save({f'module.{name}': tensor for name, tensor in states[1].items()}, paths[1])
    save_file(states[2], paths[2])
    return list(map(str, paths)), states


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_files_are_averaged_exactly(files, tmp_path, capsys, suffix):
    paths, states = files
    out = tmp_path / f'out.{suffix}'
    assert main(['ckpt', 'average', *paths, str(out)]) == 0
    assert 'no floating-point' not in capsys.readouterr().out  # the counts are equal
    got = load_file(out) if suffix == 'safetensors' else torch.load(out)['model']
    for name, mean in _by_hand(states).items():
        expected = mean if states[0][name].is_floating_point() else states[0][name]
        assert got[name].dtype == expected.dtype
        assert torch.equal(got[name], expected), name
    assert saved_classes(str(out)) == list('wxyz')
    assert [p.name for p in tmp_path.iterdir() if 'out' in p.name] == [out.name]


def test_other_counts_are_the_last_ones_and_said(files, tmp_path, capsys):
    paths, states = files
    torch.save({**states[1], 'norm.num_batches_tracked': torch.tensor(8)}, paths[1])
    out = tmp_path / 'out.pth'
    assert main(['ckpt', 'average', paths[0], paths[1], str(out), '--json']) == 0
    assert json.loads(capsys.readouterr().out)['taken'] == ['norm.num_batches_tracked']
    assert int(torch.load(out)['model']['norm.num_batches_tracked']) == 8
    assert main(['ckpt', 'average', paths[0], paths[1], str(out)]) == 0
    assert f'norm.num_batches_tracked as in {paths[1]}' in capsys.readouterr().out


def test_what_does_not_fit_is_one_line_with_the_names(files, tmp_path, capsys):
    paths, states = files
    out, other = tmp_path / 'out.pth', str(tmp_path / 'other.pth')

    def refused(content, words, *sources):
        torch.save(content, other)
        assert main(['ckpt', 'average', *sources, other, str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert not out.exists()

    less = {name: tensor for name, tensor in states[0].items() if name != 'head.bias'}
    refused(less, f'{paths[0]} and {other}: only one of them has head.bias', paths[0])
    shape = {**states[0], 'head.weight': torch.zeros(5, 3)}
    refused(shape, 'head.weight (4, 3) and (5, 3)', paths[0])
    refused({'model': states[0], 'class_names': list('wxy?')}, 'other classes', paths[0])
    refused(states[0], 'takes two checkpoints or more')
    assert main(['ckpt', 'average', paths[0], paths[1], str(tmp_path / 'out.bin')]) == 2
    assert 'must end in .pth' in capsys.readouterr().err
    assert main(['ckpt', 'average', paths[0], paths[1], paths[0]]) == 2
    assert 'is a checkpoint of the average, and OUT, which comes last' in capsys.readouterr().err
    torch.save({'model': {}}, tmp_path / 'none.pth')
    none = str(tmp_path / 'none.pth')
    assert main(['ckpt', 'average', none, none, str(tmp_path / 'out.pth')]) == 2
    assert 'none.pth: has no weights' in capsys.readouterr().err


def save_tag_of_stage(data, output, stage, seed):
    """Saves an engine's tag; returns what its whole weights are."""
    config = small_config(data, OUTPUT=output, CHECKPOINT__SHARED_OUTPUT=True)
    torch.manual_seed(seed)
    model = build_model(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_config = {'zero_optimization': {'stage': stage}, 'train_micro_batch_size_per_gpu': 4}
    engine, optimizer = initialize(config, model, optimizer, ds_config)
    save_checkpoint(
        config, seed, engine, 0.0, optimizer, None, NativeScalerWithGradNormCount(),
        logging.getLogger('test'),
    )  # fmt: skip
    return {name: weight.tolist() for name, weight in whole_weights(engine).items()}


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
def test_tags_of_every_stage_and_a_file(tmp_path):
    sources, states = [], []
    for stage in range(4):
        output = tmp_path / f'stage_{stage}'
        weights = run_ranks(
            save_tag_of_stage, 2, tmp_path,
            data=str(tmp_path), output=str(output), stage=stage, seed=stage,
        )[0]  # fmt: skip
        states.append({name: torch.tensor(weight) for name, weight in weights.items()})
        sources.append(str(output / f'ckpt_epoch_{stage}'))
    states.append({name: weight + 1 for name, weight in states[0].items()})
    torch.save(states[-1], tmp_path / 'more.pth')
    out = tmp_path / 'out.safetensors'
    assert main(['ckpt', 'average', *sources, str(tmp_path / 'more.pth'), str(out)]) == 0
    got = open_file(str(out))
    expected = _by_hand(states)
    assert got.keys() == expected.keys()
    for name, mean in expected.items():
        assert torch.equal(got[name], mean), name
