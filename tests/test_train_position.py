"""Where a resumed epoch goes on, with the batch and the ranks that it has now."""

import logging

import pytest

from internvl_ds.train.position import Position

logger = logging.getLogger('test')


def loaded(**values):
    position = Position()
    position.load_state_dict({**Position(images=64, ranks=2).state_dict(), **values})
    return position


def test_it_goes_on_where_it_was():
    position = loaded(micro_batches=6, meters={'losses': 1})
    assert position.fit(images=64, ranks=2, group=3, total=22, logger=logger)
    assert (position.micro_batches, position.meters) == (6, {'losses': 1})


@pytest.mark.parametrize(
    ('images', 'ranks', 'group', 'goes_on', 'seen_twice'),
    [
        (128, 4, 1, 3, 0),  # twice the ranks: half of the micro-batches
        (32, 1, 4, 12, 0),
        (128, 4, 2, 2, 128),  # no whole update there
        (100, 4, 1, 3, 84),
    ],
)
def test_on_other_ranks_it_goes_on_after_the_same_images(
    images, ranks, group, goes_on, seen_twice, caplog
):
    position = loaded(micro_batches=6, meters={'losses': 1})
    assert not position.fit(images, ranks, group, total=100, logger=logger)
    assert (position.micro_batches, position.meters) == (goes_on, {})
    assert 6 * 64 - goes_on * images == seen_twice
    assert bool(caplog.records) == bool(seen_twice)


def test_an_epoch_that_only_lacks_its_evaluation_stays_complete():
    position = loaded(micro_batches=7, complete=True)
    position.fit(images=128, ranks=4, group=4, total=3, logger=logger)
    assert (position.micro_batches, position.complete) == (3, True)


def test_without_a_loaded_position_it_begins():
    position = Position()
    position.fit(images=64, ranks=2, group=1, total=22, logger=logger)
    assert (position.micro_batches, position.images) == (0, 64)
