"""Which tags go: pure."""

from internvl_ds.checkpoint.retention import EpochTag, tags_to_prune


def _tags(*epochs):
    return [EpochTag(i, e, f'ckpt_epoch_{e}') for i, e in enumerate(epochs, 1)]


def test_the_newest_stay():
    assert tags_to_prune(_tags(0, 1, 2, 3), 3) == ['ckpt_epoch_0']
    assert tags_to_prune(_tags(0, 5, 10), 1) == ['ckpt_epoch_0', 'ckpt_epoch_5']
    assert tags_to_prune(_tags(1, 2), 3) == []
    assert tags_to_prune([], 1) == []


def test_newest_is_what_was_saved_last_not_the_highest_epoch():
    assert tags_to_prune(_tags(8, 9, 4), 1) == ['ckpt_epoch_8', 'ckpt_epoch_9']


def test_below_one_keeps_all():
    assert tags_to_prune(_tags(0, 1, 2), 0) == []
