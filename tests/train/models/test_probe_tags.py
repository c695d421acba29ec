"""A linear probe's tags by CHECKPOINT.FROZEN: the same training, and tags without the backbone."""

import pytest

from internvl_ds.checkpoint.tag.discovery import read_header
from tests.harness.ranks import run_ranks
from tests.harness.training import write_folder
from tests.train.models import probing
from tests.train.models.tiny import backbone_file, tiny_model


@pytest.mark.ranks
def test_a_probe_resumes_alike_whatever_its_tags_hold(tmp_path):
    data = write_folder(tmp_path / 'data', classes=5, train=20, val=10, side=28)
    backbone = backbone_file(tmp_path, tiny_model())
    for found in run_ranks(probing.probe, 2, tmp_path, data=data, root=tmp_path):
        assert found['keep'] == found['once'] == found['omit']
        assert found['keep'][0] == found['keep'][1]
    tags = {how: tmp_path / how / 'ckpt_epoch_0' for how in found}
    sizes = {
        how: sum(p.stat().st_size for p in tag.glob('*_model_states.pt'))
        for how, tag in tags.items()
    }
    assert max(sizes['once'], sizes['omit']) < sizes['keep'] - 0.9 * backbone.stat().st_size
    assert read_header(tags['omit']).frozen == {'kept': 'omit', 'sources': str(backbone)}
