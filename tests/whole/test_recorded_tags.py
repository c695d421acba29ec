"""Tags that each Python saved (tests/harness/recorded_tags.py), loaded under this one."""

import json
import shutil

import pytest
import torch

from tests.harness.recorded_tags import FOLDER, check, failures, unpack

# 3.11.2-before is of the version that wrote enums as Python pickles them, and 3.11.2-plain is of
# plain DeepSpeed, which does so still.
NAMES = [
    *('py3.10.13', 'py3.11.2-before', 'py3.11.2-plain', 'py3.11.2'),
    *('py3.11.7', 'py3.12.1', 'py3.13.0'),
]
LAYOUTS = [f'{kind}_zero{stage}' for kind in ('bf16', 'fp32') for stage in range(4)] + [
    'fp16_zero2'
]
WAYS = {
    *('same layout', 'another layout', 'deepspeed'),
    *('verify', 'export', 'diff', 'pretrained'),
}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Name -> the folder of that recording; 'altered' says another number of one tag."""
    root = tmp_path_factory.mktemp('recorded')
    found = {name: unpack(FOLDER / f'{name}.tar.xz', root) for name in NAMES}
    altered = found['altered'] = root / 'altered'
    shutil.copytree(found['py3.11.7'] / 'fp32_zero1', altered / 'fp32_zero1')
    record = json.loads((found['py3.11.7'] / 'record.json').read_text())['fp32_zero1']
    record['state']['stem.weight'][1] = record['state']['stem.weight'][2]
    (altered / 'record.json').write_text(json.dumps({'fp32_zero1': record}))
    return found


@pytest.fixture(scope='module')
def results(folders, tmp_path_factory):
    """'NAME/LAYOUT' -> way -> 'ok', or what is wrong. One job for all: its start takes longest."""
    return check(list(folders.values()), tmp_path_factory.mktemp('work'))


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_all_state_of_a_tag_is_what_was_saved_in_every_way_of_loading(results, name):
    own = {key: ways for key, ways in results.items() if key.startswith(f'{name}/')}
    assert sorted(own) == sorted(f'{name}/{layout}' for layout in LAYOUTS)
    assert all(ways.keys() == WAYS for ways in own.values())
    assert failures(own) == []


@pytest.mark.ranks
@pytest.mark.slow
def test_a_number_that_is_not_what_was_recorded_is_told_by_name(results):
    wrong = failures({'altered': results['altered/fp32_zero1']})
    ways = ('another layout', 'deepspeed', 'same layout')
    assert sorted(wrong) == [f'altered, {way}: differs: state stem.weight' for way in ways]


@pytest.mark.parametrize(
    ('name', 'calls'), [('py3.11.2-before', True), ('py3.11.2-plain', True), ('py3.11.2', False)]
)
def test_the_enums_of_python_3_11_2_are_in_the_form_that_the_recording_is_for(folders, name, calls):
    for layout in ('bf16_zero1', 'fp32_zero2', 'bf16_zero3'):
        shards = sorted(folders[name].glob(f'{layout}/*/*_optim_states.pt'))
        assert len(shards) == 2
        for shard in shards:
            pickled = torch.PyTorchFileReader(str(shard)).get_record('data.pkl')
            assert (b'getattr' in pickled) == calls, shard
            assert b'ZeroStageEnum' in pickled
