"""The original's .pth: into an engine at every stage, and exported back into a plain loop."""

import pytest
import torch

from internvl_ds.checkpoint.formats.pth_format import weights_of_file
from internvl_ds.errors import CheckpointMismatch
from internvl_ds.tools.cli import main
from tests.checkpoint.formats import originals
from tests.harness.ranks import run_ranks

CLOSE = 1e-5


@pytest.mark.parametrize('key', ['model', 'module', 'state_dict', None])
def test_weights_are_found_where_files_keep_them(key):
    weights = {'head.bias': torch.ones(3)}
    assert weights_of_file({key: weights, 'epoch': 1} if key else weights, 'x.pth') == weights
    odd = {'head.bias': torch.ones(3), 'epoch': 1}
    with pytest.raises(CheckpointMismatch, match=r"x\.pth: 'epoch' is a int, not a tensor"):
        weights_of_file({key: odd} if key else odd, 'x.pth')


@pytest.fixture(scope='module', params=['adamw', 'sgd'])
def loop(request, tmp_path_factory):
    """The optimizer, the folder of its file, and what the plain DDP loop saw."""
    root = tmp_path_factory.mktemp(request.param)
    result = run_ranks(originals.train_and_save, 2, root, root=root, kind=request.param)[0]
    return request.param, root, result


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('stage', [1, 2, 3])
def test_a_plain_loops_file_goes_on_in_an_engine_and_back(loop, stage, tmp_path):
    kind, root, plain = loop
    results = run_ranks(originals.resume_in_engine, 2, tmp_path, root=root, kind=kind, stage=stage)
    for got in results:
        assert got['accuracy'] == [61.5, 62.5, 0.9]
        assert (got['epoch'], got['updates']) == (1, 3)
        assert sorted({s[0] for s in got['settings'].values()}) == pytest.approx(
            sorted(set(plain['lrs'])), rel=1e-9
        )
        # frozen.* is not trained; again.weight is tied.weight
        assert 'tied.weight' in got['state']
        assert 'frozen.weight' not in got['state']
        assert got['losses'] == pytest.approx(plain['losses'][:3], rel=CLOSE)

    exported = tmp_path / 'ckpt_epoch_1.pth'
    assert main(['ckpt', 'export', results[0]['path'], str(exported)]) == 0
    assert main(['ckpt', 'diff', results[0]['path'], str(exported)]) == 0
    for got in run_ranks(originals.resume_in_loop, 2, tmp_path, path=exported, kind=kind):
        assert got['epoch'] == 2
        assert got['losses'] == pytest.approx(plain['losses'][3:], rel=CLOSE)
        for name, weight in got['weights'].items():
            assert weight == pytest.approx(plain['weights'][name], abs=CLOSE), name
        # the engine's average was loaded and saved, and no update of it was made in between
        for name, average in got['ema'].items():
            if name.startswith('frozen'):  # timm's averages it too, and rounds: ours keeps it
                assert average == pytest.approx(plain['ema'][name], abs=1e-7), name
            else:
                assert average == plain['ema'][name], name
