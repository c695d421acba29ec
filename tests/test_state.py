"""state.json reads back exactly, or says what it cannot keep."""

from collections import Counter

import numpy as np
import pytest
import torch

from internvl_ds.checkpoint.state import read_state, write_state
from internvl_ds.errors import CheckpointError


def test_values_read_back_with_their_types(tmp_path):
    state = {
        'lr': 0.1 + 0.2,
        'inf': float('inf'),
        'range': (1, 2),
        'milestones': Counter({30: 1, 60: 2}),
        'by_int': {3: [1.5, None, True]},
        'text': 'ä',
        '__internvl_ds__': 'a key of the user',
    }
    write_state(tmp_path / 'state.json', state)
    back = read_state(tmp_path / 'state.json')
    assert back == state
    assert type(back['milestones']) is Counter
    assert type(back['range']) is tuple


def test_scalars_of_numpy_and_torch_become_numbers(tmp_path):
    write_state(tmp_path / 's', {'a': np.float64(1.5), 'b': torch.tensor(2), 'c': np.bool_(True)})
    assert read_state(tmp_path / 's') == {'a': 1.5, 'b': 2, 'c': True}


def test_torch_schedulers_read_back(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    write_state(tmp_path / 's', scheduler.state_dict())
    assert read_state(tmp_path / 's') == scheduler.state_dict()


def test_what_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r's\.lr_scheduler\.table\[1\] is a Tensor'):
        write_state(tmp_path / 's', {'lr_scheduler': {'table': [1, torch.zeros(2)]}})
    assert not (tmp_path / 's').exists()


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / 's').write_text('{"a":')
    with pytest.raises(CheckpointError, match='s: cannot be read'):
        read_state(tmp_path / 's')
