"""What a rank's loop gets back from a tag, and what is said where it gets nothing."""

import logging
import random

import pytest

from internvl_ds.checkpoint.formats import loop_json
from internvl_ds.checkpoint.formats.loop_json import SavedLoop
from internvl_ds.checkpoint.formats.rng import rng_state
from internvl_ds.checkpoint.formats.state_json import state_text
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


def restore(path, state, saved_ranks, loop):
    saved = SavedLoop(path, saved_ranks)
    saved.restore_loop(loop, 5)
    saved.restore_generators(state, logger)


def first_of(seed):
    return random.Random(seed).random()


def test_on_as_many_ranks_generators_and_loop_go_on(tag, caplog):
    loop = Loop()
    restore(tag, INSIDE, 1, loop)
    assert loop.loaded == {'at': 0}
    assert random.random() == first_of(7)
    assert not caplog.records


def test_each_rank_has_its_own(tag, monkeypatch):
    monkeypatch.setattr(loop_json, 'rank', lambda: 1)
    monkeypatch.setattr(loop_json, 'world_size', lambda: 2)
    for saved_ranks, whose in ((2, 1), (3, 0)):
        loop = Loop()
        SavedLoop(tag, saved_ranks).restore_loop(loop, 5)
        assert loop.loaded == {'at': whose}


def test_on_another_number_of_ranks_only_the_loop_does(tag, caplog):
    loop = Loop()
    with caplog.at_level(logging.INFO):
        restore(tag, INSIDE, 2, loop)
    assert loop.loaded == {'at': 0}
    assert random.random() == first_of(8)
    assert 'saved by 2 ranks; random numbers are drawn anew' in caplog.text


def test_a_loop_that_keeps_no_position_is_told_that_the_epoch_begins_anew(tag, caplog):
    restore(tag, INSIDE, 1, None)
    assert 'was saved inside epoch 3' in caplog.text
    assert 'the epoch is begun anew' in caplog.text


def test_after_an_epoch_there_is_nothing_to_miss(tag, caplog):
    restore(tag, {'epoch': 3, 'step': None}, 1, None)
    assert not caplog.records


def test_a_tag_of_plain_deepspeed_has_none(tmp_path, caplog):
    loop = Loop()
    restore(tmp_path, {}, 1, loop)
    assert loop.loaded is None
    assert not caplog.records


def test_a_file_that_cannot_be_read_is_an_error(tag):
    (tag / 'loop_rank_0.json').write_text('{')
    with pytest.raises(CheckpointError, match=r'loop_rank_0\.json: cannot be read'):
        restore(tag, INSIDE, 1, Loop())


@pytest.mark.parametrize(
    'text',
    ['[]', '{}', '{"loop": {}}', '{"loop": 5, "rng": {}}', '{"loop": null, "rng": {"python": []}}'],
)
def test_what_does_not_belong_there_is_an_error_before_the_loop_or_a_generator_changes(tag, text):
    (tag / 'loop_rank_0.json').write_text(text)
    loop = Loop()
    with pytest.raises(CheckpointError, match=r'loop_rank_0\.json'):
        restore(tag, INSIDE, 1, loop)
    assert loop.loaded is None
    assert random.random() == first_of(8)


@pytest.mark.parametrize('generator', ['python', 'numpy', 'torch'])
def test_a_state_that_one_generator_does_not_take_changes_none(tag, generator):
    text = state_text({'rng': {**rng_state(), generator: [1]}, 'loop': {'at': 0}})
    (tag / 'loop_rank_0.json').write_text(text)
    loop = Loop()
    with pytest.raises(CheckpointError, match=r'loop_rank_0\.json'):
        restore(tag, INSIDE, 1, loop)
    assert loop.loaded is None


def test_a_state_that_the_loop_does_not_take_is_an_error_that_names_the_tag(tag):
    class Strict(Loop):
        def load_state_dict(self, state):
            self.loaded = state['position']

    with pytest.raises(CheckpointError, match="the state of the loop.*KeyError: 'position'"):
        restore(tag, INSIDE, 1, Strict())
    assert random.random() == first_of(8)
