"""What a rank's loop gets back from a tag, and what is said where it gets nothing."""

import logging
import random

import pytest

from internvl_ds.checkpoint.loop_state import restore_loop
from internvl_ds.checkpoint.rng import rng_state
from internvl_ds.checkpoint.state import state_text
from internvl_ds.errors import CheckpointError

logger = logging.getLogger('test')
INSIDE = {'epoch': 3, 'step': 5}


class Loop:
    def __init__(self):
        self.loaded = None

    def load_state_dict(self, state):
        self.loaded = state


@pytest.fixture
def tag(tmp_path):
    random.seed(7)
    for rank in range(2):
        text = state_text({'rng': rng_state(), 'loop': {'at': rank}})
        (tmp_path / f'loop_rank_{rank}.json').write_text(text)
    random.seed(8)
    return tmp_path


def first_of(seed):
    return random.Random(seed).random()


def test_on_as_many_ranks_generators_and_loop_go_on(tag, caplog):
    loop = Loop()
    restore_loop(tag, INSIDE, 1, loop, 5, logger)
    assert loop.loaded == {'at': 0}
    assert random.random() == first_of(7)
    assert not caplog.records


def test_on_another_number_of_ranks_only_the_loop_does(tag, caplog):
    loop = Loop()
    with caplog.at_level(logging.INFO):
        restore_loop(tag, INSIDE, 2, loop, 5, logger)
    assert loop.loaded == {'at': 0}
    assert random.random() == first_of(8)
    assert 'saved by 2 ranks; random numbers are drawn anew' in caplog.text


def test_a_loop_that_keeps_no_position_is_told_that_the_epoch_begins_anew(tag, caplog):
    restore_loop(tag, INSIDE, 1, None, 5, logger)
    assert 'was saved inside epoch 3' in caplog.text
    assert 'the epoch is begun anew' in caplog.text


def test_after_an_epoch_there_is_nothing_to_miss(tag, caplog):
    restore_loop(tag, {'epoch': 3, 'step': None}, 1, None, 5, logger)
    assert not caplog.records


def test_a_tag_of_plain_deepspeed_has_none(tmp_path, caplog):
    loop = Loop()
    restore_loop(tmp_path, {}, 1, loop, 5, logger)
    assert loop.loaded is None
    assert not caplog.records


def test_a_file_that_cannot_be_read_is_an_error(tag):
    (tag / 'loop_rank_0.json').write_text('{')
    with pytest.raises(CheckpointError, match=r'loop_rank_0\.json: cannot be read'):
        restore_loop(tag, INSIDE, 1, Loop(), 5, logger)
