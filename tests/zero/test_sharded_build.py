"""A build in slices gives the numbers of a whole build, bit for bit, in 1/N of its memory."""

import pytest
import torch
from torch import nn

from internvl_ds.config.tree import default_config
from internvl_ds.errors import ConfigError
from internvl_ds.zero.sharded_build import choose_build
from tests.harness.ranks import run_ranks
from tests.train.models import tiny
from tests.zero import sharding

MODELS = ['odd', 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224']


@pytest.mark.first
@pytest.mark.ranks
def test_the_numbers_are_those_of_a_whole_build(tmp_path):
    model = nn.Sequential(nn.Linear(700, 300), nn.Linear(300, 40))
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    backbone = tiny.backbone_file(tmp_path, tiny.tiny_model(EMBED_DIM=320))
    names = [*MODELS, str(tmp_path / 'weights.pth'), str(backbone)]
    for result in run_ranks(sharding.compare, 2, tmp_path, names=names):
        for name, got in result.items():
            assert got['finished'], name
            assert got['wrong'] == [], name
            assert got['generator'], name
            assert got['kept'] < 0.51 * got['all'], name
        assert result[str(backbone)]['gathers'] == 0


@pytest.mark.ranks
def test_each_rank_has_its_slices_and_the_largest_tensor_at_the_most(tmp_path):
    blocks, width = 64, 1024
    whole, largest = 4 * blocks * width * width, 4 * width * width
    for result in run_ranks(sharding.peak, 2, tmp_path, blocks=blocks, width=width):
        assert result['whole'] > 0.99 * whole, result
        # A slice of what is gathered is there beside it, and what was freed and not yet given back.
        assert result['slices'] < whole / 2 + 1.5 * largest + (32 << 20), result


@pytest.mark.ranks
def test_what_cannot_be_built_in_slices_is_named(tmp_path):
    for result in run_ranks(sharding.refused, 2, tmp_path):
        assert 'a parameter of shape (700, 700) is given the shape (3, 3)' in result['resized']
        assert "set TRAIN.SHARDED_BUILD 'never'" in result['resized']


@pytest.mark.ranks
def test_ranks_that_draw_other_weights_are_found_out(tmp_path):
    assert run_ranks(sharding.digests, 2, tmp_path) == [[True, False]] * 2


@pytest.mark.parametrize(
    ('zero', 'reason'),
    [
        ({'stage': 2}, '/zero_optimization/stage is 2, and only stage 3'),
        ({'stage': 3, 'zero_hpz_partition_size': 2}, 'zero_hpz_partition_size is 2'),
    ],
)
def test_always_is_refused_where_there_are_no_slices_and_auto_builds_whole(zero, reason):
    config, tree = default_config(), {'zero_optimization': zero}
    assert choose_build(config, tree) is None
    config.TRAIN.SHARDED_BUILD = 'always'
    with pytest.raises(ConfigError, match=f"SHARDED_BUILD 'always': .*{reason}"):
        choose_build(config, tree)
    config.TRAIN.SHARDED_BUILD = 'yes'
    with pytest.raises(ConfigError, match="is 'yes'; it can be 'auto', 'always', 'never'"):
        choose_build(config, {'zero_optimization': {'stage': 3}})
