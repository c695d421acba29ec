"""Weight files: what is read, and what is refused without running any of it."""

import argparse
import json
import os
import pickle
import re
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from yacs.config import CfgNode

from internvl_ds.checkpoint.sources.open_weights import open_weights
from internvl_ds.errors import PretrainedError

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
    source = open_weights(path)
    assert list(source) == ['model', 'epoch']
    assert source['epoch'] == 3
    assert_same(source['model'], weights())


def test_zip_file_is_mapped_not_read(tmp_path):
    path = save({'a': torch.zeros(1 << 20)}, tmp_path / 'w.pth')
    maps = Path('/proc/self/maps')
    if not maps.exists():
        pytest.skip('no /proc')
    source = open_weights(path)
    assert path in maps.read_text()
    assert source['a'].shape == (1 << 20,)


def test_safetensors_file(tmp_path):
    path = tmp_path / 'w.safetensors'
    safetensors.torch.save_file(weights(), path)
    assert_same(dict(sorted(open_weights(str(path)).items())), weights())


@ZIP_OR_LEGACY
@pytest.mark.parametrize('frozen', [True, False])
def test_original_checkpoint_with_a_yacs_config(tmp_path, is_zip, frozen):
    config = CfgNode({'MODEL': {'NAME': 'vit', 'DEPTHS': [2, 2]}, 'AUG': {'SCALE': (0.1, 1.0)}})
    if frozen:
        config.freeze()
    args = argparse.Namespace(cfg='a.yaml', lr=0.1)
    checkpoint = {'model': weights(), 'config': config, 'epoch': 3, 'args': args}
    source = open_weights(save(checkpoint, tmp_path / 'ckpt_epoch_3.pth', is_zip))
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
        open_weights(path)
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
        open_weights(str(path))
    assert not marker.exists()


@ZIP_OR_LEGACY
def test_payload_in_the_metadata_is_never_run(tmp_path, is_zip):
    marker, state = tmp_path / 'was_run', weights()
    state._metadata = OrderedDict({'': Payload(os.system, f'touch {marker}')})
    with pytest.raises(PretrainedError, match='refused'):
        open_weights(save(state, tmp_path / 'w.pth', is_zip))
    assert not marker.exists()


def test_class_that_is_not_allowed_is_named(tmp_path):
    path = save({'model': weights(), 'acc': np.float64(81.5)}, tmp_path / 'w.pth')
    with pytest.raises(PretrainedError, match=r'object of numpy\.\S+, which is refused'):
        open_weights(path)


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
        open_weights(str(path))
    assert str(caught.value).startswith(str(path))


@ZIP_OR_LEGACY
def test_truncated_file(tmp_path, is_zip):
    path = Path(save(weights(), tmp_path / 'w.pth', is_zip))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PretrainedError, match='cannot be read'):
        open_weights(str(path))


def test_missing_file_directory_and_empty_path(tmp_path):
    with pytest.raises(PretrainedError, match=r'nowhere\.pth: no such file'):
        open_weights(str(tmp_path / 'nowhere.pth'))
    with pytest.raises(PretrainedError, match=f'{re.escape(str(tmp_path))}: is a directory'):
        open_weights(str(tmp_path))
    with pytest.raises(PretrainedError, match='path of the weights is empty'):
        open_weights('')


def test_top_level_must_be_a_mapping(tmp_path):
    path = save([torch.zeros(1)], tmp_path / 'w.pth')
    with pytest.raises(PretrainedError, match='holds a list, not a mapping'):
        open_weights(path)


@pytest.mark.parametrize('scheme', ['http', 'HTTP', 'ftp', 'file', 's3'])
def test_nothing_but_https_is_downloaded_from(scheme):
    with pytest.raises(PretrainedError, match=f'{scheme}://example.org/w.pth: .* use https'):
        open_weights(f'{scheme}://example.org/w.pth')


def write_index(folder, places, name='model.safetensors.index.json'):
    path = folder / name
    path.write_text(json.dumps({'metadata': {}, 'weight_map': places}))
    return path


@pytest.mark.parametrize('by', ['directory', 'index'])
def test_indexed_files(tmp_path, by):
    safetensors.torch.save_file({'a': weights()['a']}, tmp_path / '1.safetensors')
    torch.save({'b': weights()['b'], 'c': torch.ones(1)}, tmp_path / '2.bin')
    index = write_index(tmp_path, {'a': '1.safetensors', 'b': '2.bin'})
    assert_same(open_weights(str(tmp_path if by == 'directory' else index)), weights())


def test_a_directory_with_one_file_as_hugging_face_names_it(tmp_path):
    safetensors.torch.save_file(weights(), tmp_path / 'model.safetensors')
    assert_same(dict(sorted(open_weights(str(tmp_path)).items())), weights())


@pytest.mark.parametrize('file', ['../secret.pth', '/etc/passwd', 'sub/1.pth', '..', ''])
def test_an_index_that_points_outside_is_refused_and_nothing_read(tmp_path, file):
    folder = tmp_path / 'weights'
    (folder / 'sub').mkdir(parents=True)
    for place in (tmp_path / 'secret.pth', folder / 'sub' / '1.pth'):
        torch.save(weights(), place)
    write_index(folder, {'a': file})
    with pytest.raises(PretrainedError, match='which is no file of weights beside it'):
        open_weights(str(folder))


@pytest.mark.parametrize('text', ['{', '[]', '{}', '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_what_is_no_index(tmp_path, text):
    path = tmp_path / 'model.safetensors.index.json'
    path.write_text(text)
    with pytest.raises(PretrainedError, match='is no index of weights'):
        open_weights(str(tmp_path))


def test_an_index_whose_files_lack_keys_or_are_missing(tmp_path):
    torch.save(weights(), tmp_path / '1.bin')
    write_index(tmp_path, {'a': '1.bin', 'z': '1.bin'})
    with pytest.raises(PretrainedError, match='1 of its keys are not where it says: z in 1.bin'):
        open_weights(str(tmp_path))
    write_index(tmp_path, {'a': '2.bin'})
    with pytest.raises(PretrainedError, match=r'2\.bin: no such file'):
        open_weights(str(tmp_path))
    write_index(tmp_path, {'a': 'model.safetensors.index.json'})  # itself
    with pytest.raises(PretrainedError, match='no file of weights beside it'):
        open_weights(str(tmp_path))


def test_a_payload_in_one_file_of_many_is_never_run(tmp_path):
    marker = tmp_path / 'was_run'
    torch.save({'a': Payload(os.system, f'touch {marker}')}, tmp_path / '1.bin')
    write_index(tmp_path, {'a': '1.bin'})
    with pytest.raises(PretrainedError, match='refused'):
        open_weights(str(tmp_path))
    assert not marker.exists()


def test_a_payload_in_a_shard_of_a_tag_is_never_run(tmp_path):
    marker, tag = tmp_path / 'was_run', tmp_path / 'tag'
    tag.mkdir()
    torch.save(
        {'module': weights(), 'x': Payload(os.system, f'touch {marker}')},
        tag / 'mp_rank_00_model_states.pt',
    )
    with pytest.raises(PretrainedError, match='refused'):
        open_weights(str(tag))
    assert not marker.exists()


def test_the_average_of_a_file_on_request(tmp_path):
    path = save({'model': {}, 'model_ema': weights()}, tmp_path / 'w.pth')
    assert_same(open_weights(path, ema=True), weights())
    without = save({'model': weights()}, tmp_path / 'v.pth')
    for place in (without, str(tmp_path)):
        with pytest.raises(PretrainedError, match='holds no averaged weights'):
            open_weights(place, ema=True)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    whole, bomb = tmp_path / 'w.pth', tmp_path / 'bomb.pth'
    torch.save({'a': torch.zeros(1 << 22)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as out:
        for entry in source.infolist():
            out.writestr(entry.filename, source.read(entry))
    assert bomb.stat().st_size < whole.stat().st_size / 100
    with pytest.raises(PretrainedError, match='is compressed, and says that it has'):
        open_weights(str(bomb))


def test_an_archive_whose_entries_claim_more_than_there_is_is_refused(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save({'a': torch.arange(1000.0)}, path)
    raw = path.read_bytes()
    real, claimed = (4000).to_bytes(4, 'little'), (1 << 31).to_bytes(4, 'little')
    at = raw.rindex(real * 2)  # the two sizes in the central directory
    path.write_bytes(raw[:at] + claimed * 2 + raw[at + 8 :])
    with pytest.raises(PretrainedError, match='cannot be read'):
        open_weights(str(path))


@pytest.mark.parametrize('is_zip', [True, False])
def test_a_storage_that_claims_more_than_there_is_is_refused(tmp_path, is_zip):
    path = tmp_path / 'w.pth'
    torch.save({'a': torch.arange(1000.0)}, path, _use_new_zipfile_serialization=is_zip)
    raw = path.read_bytes()
    # pickle's BININT2 of the number of elements becomes a BININT of 2 ** 30
    claimed = raw.replace(
        b'M' + (1000).to_bytes(2, 'little'), b'J' + (1 << 30).to_bytes(4, 'little')
    )
    assert claimed != raw
    path.write_bytes(claimed)
    with pytest.raises(PretrainedError, match='cannot be read'):
        open_weights(str(path))


@pytest.mark.parametrize(
    'change',
    [
        lambda h: h['a'].update(data_offsets=[0, 1 << 40]),
        lambda h: h['a'].update(shape=[1 << 20, 1 << 20]),
        lambda h: h['a'].update(data_offsets=h['b']['data_offsets']),
        lambda h: h['a'].update(dtype='CODE'),
    ],
    ids=['offsets', 'shape', 'overlap', 'dtype'],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, change):
    path = tmp_path / 'w.safetensors'
    safetensors.torch.save_file(weights(), path)
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], 'little')
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + raw[8 + size :])
    with pytest.raises(PretrainedError, match='cannot be read'):
        open_weights(str(path))
    path.write_bytes((1 << 60).to_bytes(8, 'little') + raw[8:])
    with pytest.raises(PretrainedError, match='cannot be read'):
        open_weights(str(path))
