"""The training program with a model that was built in slices: the same run, to the bit."""

import pytest
import torch

from internvl_ds.train.model import build_model
from tests.harness.training import small_config, write_folder
from tests.train.test_loop import timeless, train, write_config


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('images'), classes=3, train=29, val=7)


def both(tmp_path, cfg, *opts, level='O0'):
    """The same run twice, the model built whole and in slices; OUTPUT and metrics of each."""
    found = []
    for build in ('never', 'always'):
        result = train(
            tmp_path, cfg, f'{build}{len(opts)}', 3, 'TRAIN.SHARDED_BUILD', build, *opts,
            level=level,
        )[0]  # fmt: skip
        output = tmp_path / f'{build}{len(opts)}' / 'small'
        told = 'built in 2 slices' in (output / 'log_rank0.txt').read_text()
        assert told == (build == 'always')
        found.append((output, timeless(result)))
    return found


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('level', ['O0', 'O1', 'O2'])
def test_a_run_and_its_resumption_are_those_of_a_whole_build(tmp_path, data, level):
    cfg = write_config(tmp_path, data, TRAIN__LR_LAYER_DECAY=True)
    (_, whole), (output, sliced) = both(tmp_path, cfg, level=level)
    assert sliced == whole
    if level == 'O2':  # from the tag of the first epoch, into a model in slices
        tag = str(output / 'ckpt_epoch_0')
        (_, resumed), (_, again) = both(tmp_path, cfg, 'MODEL.RESUME', tag, level=level)
        assert again == resumed == whole[1:]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('level', ['O0', 'O2'])
def test_pretrained_weights_come_by_slices_under_a_frozen_backbone(tmp_path, data, level):
    torch.manual_seed(5)
    weights = build_model(small_config(data, MODEL__NUM_CLASSES=7)).state_dict()
    torch.save({'model': weights}, tmp_path / 'weights.pth')
    cfg = write_config(
        tmp_path, data, MODEL__PRETRAINED=str(tmp_path / 'weights.pth'),
        TRAIN__RAND_INIT_FT_HEAD=True, TRAIN__OPTIMIZER__FREEZE_BACKBONE=True,
    )  # fmt: skip
    (_, whole), (_, sliced) = both(tmp_path, cfg, level=level)
    assert sliced == whole
