"""The command over the real program: one checkpoint, six columns, on one rank and on two."""

import json
import sys

import pytest
import torch

from internvl_ds.dist.network import free_port
from internvl_ds.tools.cli import main
from internvl_ds.train.datasets.imagenet import wnids_1k
from tests.harness.ranks import run_command
from tests.train.datasets.made import (
    Colours,
    variant_config,
    write_variant,
)

PROGRAM = [sys.executable, '-m', 'internvl_ds.tools.cli', 'evaluate']


@pytest.fixture
def words(tmp_path):
    """Of the command: a root with two data sets, a third elsewhere, and a checkpoint of weights."""
    wnids = wnids_1k()
    for name, labels in (('imagenet-a', range(6, 12)), ('imagenet-sketch', (0, 7))):
        write_variant(tmp_path / 'data' / name, {wnids[label]: label for label in labels})
    write_variant(tmp_path / 'v2', {'3': 3, '20': 20})
    cfg = tmp_path / 'colours.yaml'
    cfg.write_text(variant_config(tmp_path, 'imagenet', EVAL_MODE=False).dump())
    model = Colours()
    with torch.no_grad():
        model.head.bias[7] += 100  # not what the factory makes: the checkpoint's weights count
    weights = {'model': model.state_dict(), 'max_accuracy': 1.0}
    torch.save(weights, tmp_path / 'colours.pth')
    torch.save({**weights, 'model_ema': Colours().state_dict()}, tmp_path / 'averaged.pth')
    return [
        '--cfg', str(cfg), '--resume', str(tmp_path / 'colours.pth'),
        '--data', str(tmp_path / 'data'), '--variants', f'imagenetv2={tmp_path}/v2',
        '--output', str(tmp_path / 'out'), '--opts', 'TRAIN.EMA.ENABLE', 'True',
    ]  # fmt: skip


@pytest.mark.first
@pytest.mark.ranks
def test_one_checkpoint_on_many_data_sets_by_any_number_of_ranks(words, tmp_path):
    launcher = ['torchrun', '--nproc-per-node', '2', '--master-port', str(free_port())]
    averaged = [*words, '--resume', str(tmp_path / 'averaged.pth'), '--markdown']
    done = run_command([*PROGRAM, *averaged, '--', *launcher], 240)
    assert done.returncode == 0, done.output
    one = run_command([*PROGRAM, *words, '--name', 'mine', '--json'], 240)
    assert one.returncode == 0, one.output
    result = json.loads((tmp_path / 'out' / 'result.json').read_text())
    assert json.dumps(result, indent=2) in one.output
    (row,) = result['rows']  # this one has no average
    assert (row['name'], result['ranks']) == ('mine', 1)
    # By hand: with class 7 far ahead, only its image is right.
    accuracies = {name: each['acc1'] for name, each in row['results'].items()}
    assert accuracies == {
        'imagenetv2': 0.0,
        'imagenet_a': pytest.approx(100 * 3 / 18),
        'imagenet_sketch': 50.0,
    }
    assert '| colours.yaml | - | - | 0.0 | 16.7 | - | 50.0 |' in done.output
    # The average finds the right one of the three images of each class, and among six classes also
    # the others of class 11, which is the nearest of the six to them.
    assert '| colours.yaml (EMA) | - | - | 33.3 | 44.4 | - | 33.3 |' in done.output
    assert 'has no folder for imagenet, imagenet-real, imagenet_r' in done.output


def test_what_is_wrong_is_said_before_anything_starts(words, capsys):
    words = words[: words.index('--data')]
    assert main(['evaluate', *words]) == 2
    assert 'give --data ROOT' in capsys.readouterr().err
    variant = ['--variants', 'imagenet_a=x']
    assert main(['evaluate', *words, *variant, '--opts', 'DATA.DATASETS', 'x']) == 2
    assert 'the nearest known key is DATA.DATASET' in capsys.readouterr().err
    launcher = ['--', 'no-such-launcher']
    assert main(['evaluate', *words, *variant, *launcher]) == 2
    assert 'no-such-launcher: there is no such program' in capsys.readouterr().err
