"""Weight files: what is read, and what is refused without running any of it."""

import argparse
import io
import os
import pickle
import re
import subprocess
from collections import OrderedDict
from email.message import Message
from pathlib import Path
from urllib.response import addinfourl

import numpy as np
import pytest
import safetensors.torch
import torch
from yacs.config import CfgNode

from internvl_ds.errors import PretrainedError
from internvl_ds.pretrained.sources import open_source

ZIP_OR_LEGACY = pytest.mark.parametrize('is_zip', [True, False], ids=['zip', 'legacy'])


def weights():
    return OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.tensor([1, 2], dtype=torch.int64))


def save(obj, path, is_zip=True):
    torch.save(obj, path, _use_new_zipfile_serialization=is_zip)
    return str(path)


def assert_same(left, right):
    assert list(left) == list(right)
    for key, tensor in right.items():
        assert left[key].dtype == tensor.dtype
        assert torch.equal(left[key], tensor)


class Payload:
    """Unpickles by calling a function: with what is given here, one that creates a file."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@ZIP_OR_LEGACY
@pytest.mark.parametrize('name', ['w.pth', 'w.pt', 'w.bin', 'w.pth.tar', 'noname'])
def test_torch_file(tmp_path, name, is_zip):
    path = save({'model': weights(), 'epoch': 3}, tmp_path / name, is_zip)
    source = open_source(path)
    assert list(source) == ['model', 'epoch']
    assert source['epoch'] == 3
    assert_same(source['model'], weights())


def test_zip_file_is_mapped_not_read(tmp_path):
    path = save({'a': torch.zeros(1 << 20)}, tmp_path / 'w.pth')
    maps = Path('/proc/self/maps')
    if not maps.exists():
        pytest.skip('no /proc')
    source = open_source(path)
    assert path in maps.read_text()
    assert source['a'].shape == (1 << 20,)


def test_safetensors_file(tmp_path):
    path = tmp_path / 'w.safetensors'
    safetensors.torch.save_file(weights(), path)
    assert_same(dict(sorted(open_source(str(path)).items())), weights())


@ZIP_OR_LEGACY
@pytest.mark.parametrize('frozen', [True, False])
def test_original_checkpoint_with_a_yacs_config(tmp_path, is_zip, frozen):
    config = CfgNode({'MODEL': {'NAME': 'vit', 'DEPTHS': [2, 2]}, 'AUG': {'SCALE': (0.1, 1.0)}})
    if frozen:
        config.freeze()
    args = argparse.Namespace(cfg='a.yaml', lr=0.1)
    checkpoint = {'model': weights(), 'config': config, 'epoch': 3, 'args': args}
    source = open_source(save(checkpoint, tmp_path / 'ckpt_epoch_3.pth', is_zip))
    assert list(source) == ['model', 'config', 'epoch', 'args']
    assert_same(source['model'], weights())
    assert type(source['config']) is CfgNode
    assert source['config'] == config
    assert source['config'].MODEL.NAME == 'vit'
    assert source['config'].is_frozen() is frozen
    assert source['config'].AUG.is_frozen() is frozen
    assert source['args'] == args


@ZIP_OR_LEGACY
@pytest.mark.parametrize(
    ('make', 'named'),
    [
        (lambda path: Payload(subprocess.check_call, ['touch', str(path)]), 'check_call'),
        (lambda path: Payload(eval, f'open({str(path)!r}, "w")'), 'eval'),
        (lambda path: Payload(os.system, f'touch {path}'), 'posix.system'),
    ],
    ids=['subprocess', 'eval', 'system'],
)
def test_hostile_payload_is_refused_and_never_run(tmp_path, make, named, is_zip):
    marker = tmp_path / 'was_run'
    path = save({'model': weights(), 'x': make(marker)}, tmp_path / 'evil.pth', is_zip)
    with pytest.raises(PretrainedError, match=re.escape(path)) as caught:
        open_source(path)
    assert named in str(caught.value)
    assert 'refused' in str(caught.value)
    assert 'weights_only' not in str(caught.value)
    assert not marker.exists()
    # The payload does work: a plain unpickler runs it.
    pickle.loads(pickle.dumps(make(marker)))
    assert marker.exists()


def test_plain_pickle_is_refused_and_never_run(tmp_path):
    marker, path = tmp_path / 'was_run', tmp_path / 'evil.pth'
    path.write_bytes(pickle.dumps({'x': Payload(os.system, f'touch {marker}')}, protocol=2))
    with pytest.raises(PretrainedError, match=re.escape(str(path))):
        open_source(str(path))
    assert not marker.exists()


def test_class_that_is_not_allowed_is_named(tmp_path):
    path = save({'model': weights(), 'acc': np.float64(81.5)}, tmp_path / 'w.pth')
    with pytest.raises(PretrainedError, match=r'object of numpy\.\S+, which is refused'):
        open_source(path)


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('empty.pth', b''),
        ('text.pth', b'hello, this is no checkpoint'),
        ('zip.pth', b'PK\x03\x04 and then nothing'),
        ('empty.safetensors', b''),
        ('text.safetensors', b'hello, this is no checkpoint'),
    ],
)
def test_unreadable_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PretrainedError, match=r'cannot be read \(\w+.*\); \.pth') as caught:
        open_source(str(path))
    assert str(caught.value).startswith(str(path))


@ZIP_OR_LEGACY
def test_truncated_file(tmp_path, is_zip):
    path = Path(save(weights(), tmp_path / 'w.pth', is_zip))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PretrainedError, match='cannot be read'):
        open_source(str(path))


def test_missing_file_directory_and_empty_path(tmp_path):
    with pytest.raises(PretrainedError, match=r'nowhere\.pth: no such file'):
        open_source(str(tmp_path / 'nowhere.pth'))
    with pytest.raises(PretrainedError, match=f'{re.escape(str(tmp_path))}: is a directory'):
        open_source(str(tmp_path))
    with pytest.raises(PretrainedError, match='path of the weights is empty'):
        open_source('')


def test_top_level_must_be_a_mapping(tmp_path):
    path = save([torch.zeros(1)], tmp_path / 'w.pth')
    with pytest.raises(PretrainedError, match='holds a list, not a mapping'):
        open_source(path)


def test_https_checks_the_hash_and_keeps_the_allowed_classes(monkeypatch, caplog, tmp_path):
    path = save({'model': weights(), 'config': CfgNode({'A': 1})}, tmp_path / 'w.pth')
    calls = []

    def fake(url, **options):
        calls.append((url, options))
        return torch.load(path, weights_only=True)

    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', fake)
    source = open_source('https://example.org/w-0123abcd.pth')
    options = {'map_location': 'cpu', 'check_hash': True, 'weights_only': True}
    assert calls == [('https://example.org/w-0123abcd.pth', options)]
    assert source['config'].A == 1
    assert not caplog.records
    open_source('https://example.org/w.pth?download=true')
    assert 'cannot be checked' in caplog.text


def test_https_with_a_wrong_hash(monkeypatch, tmp_path):
    path = save(weights(), tmp_path / 'w.pth')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))

    def reply(*_):
        return addinfourl(io.BytesIO(Path(path).read_bytes()), Message(), 'https://example.org')

    monkeypatch.setattr(torch.hub, 'urlopen', reply)
    with pytest.raises(PretrainedError, match=r'0000abcd\.pth: cannot be read .*invalid hash'):
        open_source('https://example.org/w-0000abcd.pth')
    assert not list((tmp_path / 'hub' / 'checkpoints').glob('w-*'))


def test_http_is_refused():
    with pytest.raises(PretrainedError, match='use https'):
        open_source('http://example.org/w.pth')
