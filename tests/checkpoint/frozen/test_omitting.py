"""CHECKPOINT.FROZEN 'omit': frozen parameters stay in the file that load_pretrained took."""

import re
import shutil

import pytest
import torch

from internvl_ds import load_checkpoint, load_pretrained
from internvl_ds.checkpoint.tag.verify import damage_of_tag
from internvl_ds.errors import CheckpointError
from internvl_ds.tools.cli import main
from tests.checkpoint.frozen import freezing
from tests.harness.elastic import Net
from tests.harness.model import make_config
from tests.harness.ranks import run_ranks


@pytest.mark.ranks
@pytest.mark.first
def test_tags_omit_what_is_frozen_and_every_reader_finds_it(tmp_path):
    torch.manual_seed(21)
    source = tmp_path / 'weights.pth'
    torch.save({'model': Net().state_dict()}, source)
    both = run_ranks(freezing.omit, 2, tmp_path, root=str(tmp_path), source=str(source))
    for found in both:
        refused = found.pop('none')
        assert 'frozen.bias, frozen.weight (2 frozen parameters) came from no file' in refused
        for stage, got in found.items():
            assert got['held'] == [[], []], stage
            text = got['changed']
            assert re.search(rf'frozen.weight, frozen.bias .*as load_pretrained.*{source}', text)
            assert "FROZEN to 'once'" in text
            assert got['bare'] == [], stage
            for key in [key for key in got if key.startswith('into')]:
                weights, state, again, losses, wanted = got[key]
                assert (weights, state, again) == ([], True, 'done'), (stage, key)
                same = key == f'into {stage}'
                close = pytest.approx(wanted, rel=1e-2 if stage == '2' else 1e-5)
                assert losses == (wanted if same else close), (stage, key)
    for stage in found:
        harm(tmp_path / stage / 'ckpt_epoch_1', source, tmp_path / f'moved{stage}')


def harm(tag, source, moved):
    """The source changed, gone, next to the tag, and elsewhere by MODEL.PRETRAINED."""
    assert damage_of_tag(tag) == []
    moved.mkdir()
    assert main(['ckpt', 'export', str(tag), str(moved / 'out.safetensors')]) == 0
    away = moved / 'renamed.pth'
    source.rename(away)
    try:
        told = f'loaded from {source}; {source} is not there'
        assert [told in text for text in damage_of_tag(tag)] == [True]
        torch.save({'model': Net().state_dict()}, source)
        for text in damage_of_tag(tag):  # of each rank's slices at stage 3
            assert f'{source} has other values' in text
        assert main(['ckpt', 'verify', str(tag)]) == 1
        with pytest.raises(CheckpointError, match='has other values'):
            evaluate(tag)
        assert evaluate(tag, MODEL__PRETRAINED=str(away)).keys() == Net().state_dict().keys()
        paths = {'MODEL__PRETRAINED': str(tag), 'MODEL__INTERN_VIT_6B__PRETRAINED': str(away)}
        report = load_pretrained(make_config(**paths), Net(), freezing.logger)
        assert report.missing == ()
        source.unlink()
        shutil.copy(away, tag.parent / source.name)
        assert damage_of_tag(tag) == []
    finally:
        away.rename(source)


def evaluate(tag, **values):
    model = Net()
    config = make_config(EVAL_MODE=True, MODEL__RESUME=str(tag), **values)
    load_checkpoint(config, model, None, None, None, freezing.logger)
    return model.state_dict()
