"""Where a resumed epoch goes on, with the batch and the ranks that it has now."""

import logging

import pytest

from internvl_ds.train.position import Position

logger = logging.getLogger('test')
ORDER = {'images': 1433, 'SEED': 0, 'file names': 'a'}


def loaded(**values):
    position = Position()
    saved = Position(images=64, ranks=2, order=dict(ORDER)).state_dict()
    position.load_state_dict({**saved, **values})
    return position


def test_it_goes_on_where_it_was(caplog):
    position = loaded(micro_batches=6, meters={'losses': 1})
    assert position.fit(images=64, ranks=2, group=3, total=22, logger=logger, order=ORDER)
    assert (position.micro_batches, position.meters) == (6, {'losses': 1})
    assert caplog.text == ''


@pytest.mark.parametrize('change', [{'images': 36}, {'SEED': 1}, {'file names': 'b'}])
@pytest.mark.parametrize('ranks', [2, 4])
def test_in_another_order_of_images_the_epoch_is_begun_anew(change, ranks, caplog):
    position = loaded(micro_batches=6, meters={'losses': 1})
    order = {**ORDER, **change}
    assert not position.fit(64, ranks, 1, total=22, logger=logger, order=order)
    assert (position.micro_batches, position.meters, position.order) == (0, {}, order)
    ((key, value),) = change.items()
    assert 'the epoch is begun anew' in caplog.text
    assert f"differ in {{'{key}': ({ORDER[key]!r}, {value!r})}}" in caplog.text
    assert len(caplog.records) == 1


def test_another_order_changes_nothing_at_an_epochs_beginning_or_end(caplog):
    for place in ({}, {'micro_batches': 22, 'complete': True}):
        position = loaded(**place)
        assert position.fit(64, 2, 1, total=22, logger=logger, order={**ORDER, 'images': 36})
        assert position.micro_batches == place.get('micro_batches', 0)
    assert caplog.text == ''


def test_where_the_order_is_not_known_it_is_said(caplog):
    for position, order in (
        (loaded(micro_batches=5, order={}), ORDER),
        (loaded(micro_batches=5), None),
    ):
        caplog.clear()
        assert position.fit(64, 2, 1, total=22, logger=logger, order=order)
        assert position.micro_batches == 5
        assert 'it is not known whether its order of images is still the same' in caplog.text


def test_a_position_of_an_earlier_version_is_read():
    saved = loaded(micro_batches=5).state_dict()
    del saved['order'], saved['record']
    position = Position()
    position.load_state_dict(saved)
    assert (position.micro_batches, position.order) == (5, {})


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
    assert not position.fit(images, ranks, group, total=100, logger=logger, order=ORDER)
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


@pytest.mark.parametrize('value', [-1, '3', 2.5, None, True])
def test_what_is_no_count_is_refused_before_anything_is_taken_over(value):
    position = loaded(micro_batches=5)
    with pytest.raises(ValueError, match='micro_batches of a position is'):
        position.load_state_dict({'images': 1, 'micro_batches': value})
    assert (position.micro_batches, position.images) == (5, 64)


def test_no_more_than_an_epoch_is_left_out():
    position = loaded(micro_batches=22)
    position.fit(images=64, ranks=2, group=1, total=20, logger=logger, order=ORDER)
    assert position.micro_batches == 20
