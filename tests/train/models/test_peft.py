"""A timm model with adapters of peft trains, and its tags may hold the adapters alone."""

import pytest
import timm
import torch

from internvl_ds.checkpoint.tag.discovery import read_header
from tests.harness.ranks import run_ranks
from tests.harness.training import write_folder

pytest.importorskip('peft', reason='peft is not installed')
from tests.train.models import adapting


@pytest.mark.ranks
@pytest.mark.slow
def test_adapters_train_and_go_on_alike_whatever_tags_hold(tmp_path):
    data = write_folder(tmp_path / 'data', classes=3, train=24, val=6)
    plain = timm.create_model('vit_tiny_patch16_224', num_classes=3, **adapting.SIZES)
    weights = tmp_path / 'plain.pth'
    torch.save({'model': plain.state_dict()}, weights)
    for found in run_ranks(adapting.adapt, 2, tmp_path, data=data, root=tmp_path, weights=weights):
        for stage in (1, 3):
            whole, again = found[f'keep_{stage}']
            assert len(whole) == 2
            assert again == whole
            for frozen in ('once', 'omit'):
                assert found[f'{frozen}_{stage}'] == [whole, again]
    for stage in (1, 3):
        sizes = {}
        for frozen in ('keep', 'once', 'omit'):
            tag = tmp_path / f'{frozen}_{stage}' / 'ckpt_epoch_1'
            sizes[frozen] = sum(p.stat().st_size for p in tag.glob('*_model_states.pt'))
        assert max(sizes['once'], sizes['omit']) < sizes['keep'] / 4, sizes
        tag = tmp_path / f'omit_{stage}' / 'ckpt_epoch_1'
        assert read_header(tag).frozen == {'kept': 'omit', 'sources': str(weights)}
