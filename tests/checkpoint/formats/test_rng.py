"""The generators' states, through the text of a tag and back."""

import random

import numpy as np
import pytest
import torch

from internvl_ds.checkpoint.formats.rng import rng_state, set_rng_state
from internvl_ds.checkpoint.formats.state_json import read_state, state_text
from internvl_ds.errors import CheckpointError


def draw():
    return [
        random.random(),
        random.gauss(0, 1),
        *np.random.normal(size=3),
        *torch.randn(3).tolist(),
    ]


def test_what_is_drawn_next_is_the_same_after_the_state_was_text(tmp_path):
    draw()  # both Gauss generators keep half of a pair then
    (tmp_path / 'state.json').write_text(state_text(rng_state()))
    expected = [draw(), draw()]
    set_rng_state(read_state(tmp_path / 'state.json'))
    assert [draw(), draw()] == expected


@pytest.mark.parametrize('key', ['python', 'numpy', 'torch'])
def test_what_is_no_state_is_an_error_of_the_checkpoints(key):
    with pytest.raises(CheckpointError, match='no states of random number generators'):
        set_rng_state({**rng_state(), key: None})
