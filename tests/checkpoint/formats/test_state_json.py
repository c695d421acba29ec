"""state.json reads back exactly, or says what it cannot keep."""

from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

from internvl_ds.checkpoint.formats.state_json import (
    read_own,
    read_state,
    require_state,
    state_of,
    state_text,
)
from internvl_ds.checkpoint.tag.hashing import write_hashed
from internvl_ds.checkpoint.tag.manifest import Identity, Manifest
from internvl_ds.errors import CheckpointError
from tests.harness.tags import make_header


@pytest.fixture
def read_back(tmp_path):
    """Reads what a state's text says."""

    def read_back(state):
        (tmp_path / 'state.json').write_text(state_text(state), encoding='utf-8')
        return read_state(tmp_path / 'state.json')

    return read_back


def test_values_read_back_with_their_types(read_back):
    state = {
        'lr': 0.1 + 0.2,
        'inf': float('inf'),
        'range': (1, 2),
        'milestones': Counter({30: 1, 60: 2}),
        'by_int': {3: [1.5, None, True]},
        'ordered': OrderedDict(b=1, a=2),
        'text': 'ä',
        '__internvl_ds__': 'a key of the user',
    }
    back = read_back(state)
    assert back == state
    assert type(back['milestones']) is Counter
    assert type(back['range']) is tuple
    assert list(back['ordered']) == ['b', 'a']


def test_scalars_of_numpy_and_torch_become_numbers(read_back):
    state = {'a': np.float64(1.5), 'b': torch.tensor(2), 'c': np.bool_(True)}
    assert read_back(state) == {'a': 1.5, 'b': 2, 'c': True}


def test_torch_schedulers_read_back(read_back):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    assert read_back(scheduler.state_dict()) == scheduler.state_dict()


def test_what_cannot_be_kept_is_named():
    with pytest.raises(CheckpointError, match=r'state\.json\.lr_scheduler\.table\[1\] is a Tensor'):
        state_text({'lr_scheduler': {'table': [1, torch.zeros(2)]}})


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('epoch', 1 << 53),
        ('epoch', [3]),
        ('step', -1),
        ('lr_scheduler', 3),
        ('loss_scale', {'scale': 0.0}),
        ('loss_scale', {'scale': 1.0, '_growth_tracker': -1}),
        ('schedule', {'counts': 'epochs', 'position': 3, 'group': 1}),
        ('schedule', {'position': 3, 'group': 0}),
        ('class_names', [1]),
        ('optimizer_groups', [['a'], [1]]),
    ],
)
def test_a_value_of_another_kind_is_named(key, value):
    with pytest.raises(CheckpointError, match=f'here: {key} is '):
        require_state({key: value}, 'here')


def test_a_file_of_another_save_or_that_no_manifest_lists_is_not_read(tmp_path):
    def write(name, save):
        identity = Identity('ckpt_epoch_0', save, 0).to_dict()
        text = state_text({'epoch': 0, Identity.KEY: identity}).encode()
        return write_hashed(tmp_path / name, lambda file: file.write(text))

    files = {'state.json': write('state.json', 'other')}
    write('loop_rank_0.json', '5e6f')
    header = make_header('ckpt_epoch_0', 0, save='5e6f')
    (tmp_path / 'manifest.json').write_text(Manifest(header, files).to_text())
    with pytest.raises(CheckpointError, match="rank 0's file of save other"):
        state_of(tmp_path)
    assert read_own(tmp_path, 'loop_rank_0.json') is None


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / 's').write_text('{"a":')
    with pytest.raises(CheckpointError, match='s: cannot be read'):
        read_state(tmp_path / 's')
    with pytest.raises(CheckpointError, match='nowhere: cannot be read'):
        read_state(tmp_path / 'nowhere')
