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
from tests.harness.servers import serving


@pytest.mark.ranks
@pytest.mark.first
def test_tags_omit_what_is_frozen_and_every_reader_finds_it(tmp_path, capsys):
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
        harm(tmp_path / stage / 'ckpt_epoch_1', source, tmp_path / f'moved{stage}', capsys)


def harm(tag, source, moved, capsys):
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
        assert main(['ckpt', 'verify', str(tag)]) == 3  # its own files are as written
        assert 'all files are as written, and what it omits is not found' in capsys.readouterr().out
        assert main(['ckpt', 'list', str(tag.parent), '--verify']) == 3
        assert 'NO SOURCE: omits 2 frozen parameters' in capsys.readouterr().out
        now = ['--pretrained', str(moved / 'none.pth'), '--pretrained', str(away)]
        assert main(['ckpt', 'verify', str(tag), *now]) == 0
        assert main(['ckpt', 'export', str(tag), str(moved / 'again.safetensors'), *now]) == 0
        again = (moved / 'again.safetensors').read_bytes()
        assert again == (moved / 'out.safetensors').read_bytes()
        assert main(['ckpt', 'diff', str(tag), str(tag), *now]) == 0
        with pytest.raises(CheckpointError, match='has other values'):
            evaluate(tag)
        assert evaluate(tag, MODEL__PRETRAINED=str(away)).keys() == Net().state_dict().keys()
        paths = {'MODEL__PRETRAINED': str(tag), 'MODEL__INTERN_VIT_6B__PRETRAINED': str(away)}
        report = load_pretrained(make_config(**paths), Net(), freezing.logger)
        assert report.missing == ()
        source.unlink()
        take_from_an_address(tag, away, moved)
        shutil.copy(away, tag.parent / source.name)
        assert damage_of_tag(tag) == []
    finally:
        away.rename(source)


def take_from_an_address(tag, away, folder):
    """Another host has another cache: the configuration names the weights' address."""
    wanted = evaluate(tag, MODEL__PRETRAINED=str(away))
    answers = {'/vit.pth': away.read_bytes()}
    with serving(folder / 'server', answers) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv('SSL_CERT_FILE', str(server.certificate))
        patch.setattr(torch.hub, 'get_dir', lambda: str(folder / 'hub'))
        named = {'MODEL__TYPE': 'clip_vit', 'MODEL__CLIP_VIT__PRETRAINED': server.url('/vit.pth')}
        for names in (named, {'MODEL__PRETRAINED': server.url('/vit.pth')}):
            got = evaluate(tag, **names)
            assert all(got[key].equal(tensor) for key, tensor in wanted.items())
        with pytest.raises(CheckpointError, match=r'/none.pth: .*404.*Name its present place'):
            evaluate(tag, MODEL__PRETRAINED=server.url('/none.pth'))


def evaluate(tag, **values):
    model = Net()
    config = make_config(EVAL_MODE=True, MODEL__RESUME=str(tag), **values)
    load_checkpoint(config, model, None, None, None, freezing.logger)
    return model.state_dict()
