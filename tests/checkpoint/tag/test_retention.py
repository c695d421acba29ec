"""Which tags go: pure."""

import math
import random

import pytest

from internvl_ds.checkpoint.tag.retention import (
    EpochTag,
    KeepBest,
    KeepEvery,
    KeepLater,
    KeepNewest,
    KeepSteps,
    tags_to_prune,
)


def _tags(*epochs):
    """Tags of these epochs, in the order in which they were saved."""
    return [EpochTag(i, e, f'ckpt_epoch_{e}') for i, e in enumerate(epochs, 1)]


def _tags_with(*accuracies):
    """Tags of the epochs 0, 1, 2 ..., each with the best accuracy up to it."""
    return [EpochTag(e + 1, e, f'ckpt_epoch_{e}', a) for e, a in enumerate(accuracies)]


def _stay(tags, *policies):
    """The epochs that are left, oldest save first."""
    goes = tags_to_prune(tags, policies)
    return [tag.epoch for tag in sorted(tags) if tag.name not in goes]


def test_the_newest_stay():
    assert tags_to_prune(_tags(0, 1, 2, 3), [KeepNewest(3)]) == ['ckpt_epoch_0']
    assert tags_to_prune(_tags(0, 5, 10), [KeepNewest(1)]) == ['ckpt_epoch_0', 'ckpt_epoch_5']
    assert tags_to_prune(_tags(1, 2), [KeepNewest(3)]) == []
    assert tags_to_prune([], [KeepNewest(1)]) == []


def test_newest_is_what_was_saved_last_not_the_highest_epoch():
    assert tags_to_prune(_tags(8, 9, 4), [KeepNewest(1)]) == ['ckpt_epoch_8', 'ckpt_epoch_9']


def test_the_order_in_which_tags_are_listed_does_not_matter():
    tags = _tags_with(1.0, 3.0, 3.0, 4.0, 4.0)
    for policy in (KeepNewest(2), KeepBest(2), KeepEvery(2)):
        assert tags_to_prune(tags[::-1], [policy]) == tags_to_prune(tags, [policy])


def test_keeping_fewer_than_one_newest_keeps_all():
    for count in (0, -1):
        assert tags_to_prune(_tags(0, 1, 2), [KeepNewest(count)]) == []


def test_tags_that_do_not_say_when_they_were_saved_are_older_and_go_by_epoch():
    unknown = [EpochTag(0, 10, 'ckpt_epoch_10'), EpochTag(0, 9, 'ckpt_epoch_9')]
    assert tags_to_prune([*_tags(3), *unknown], [KeepNewest(2)]) == ['ckpt_epoch_9']


def test_the_best_stay_each_by_the_tag_that_reached_it_first():
    # epochs:           0    1    2    3    4    5
    tags = _tags_with(1.0, 3.0, 3.0, 4.0, 4.0, 4.0)
    assert _stay(tags, KeepBest(1)) == [3, 5]  # 5 was saved last
    assert _stay(tags, KeepBest(2)) == [1, 3, 5]
    assert _stay(tags, KeepBest(9)) == [0, 1, 3, 5]


def test_a_tag_without_an_accuracy_is_not_among_the_best():
    for unknown in (None, math.nan):
        assert _stay(_tags_with(unknown, 2.0, unknown, 1.0, unknown), KeepBest(1)) == [1, 4]


def test_every_interval_th_epoch_stays():
    assert _stay(_tags(*range(12)), KeepEvery(5)) == [0, 5, 10, 11]
    assert _stay(_tags(*range(4)), KeepEvery(1)) == [0, 1, 2, 3]


def test_policies_that_are_off_ask_for_no_tag():
    tags = _tags_with(1.0, 2.0, 3.0, 4.0)
    assert _stay(tags, KeepNewest(2), KeepBest(0), KeepEvery(0)) == [2, 3]


def test_a_tag_stays_when_any_policy_wants_it():
    tags = _tags_with(1.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0)
    assert _stay(tags, KeepNewest(2), KeepBest(1), KeepEvery(4)) == [0, 1, 4, 6, 7]


def test_the_tag_saved_last_always_stays():
    tags = _tags_with(9.0, 1.0, 1.0)
    assert _stay(tags, KeepBest(1)) == [0, 2]
    assert _stay(tags, KeepEvery(7)) == [0, 2]
    assert _stay(_tags(8, 9, 4), KeepEvery(100)) == [4]


def test_tags_from_inside_epochs_are_counted_by_themselves():
    steps = [EpochTag(n, 4, f'ckpt_epoch_4_step_{n}', 50.0, n) for n in (5, 6, 7)]
    tags = [*_tags(0, 1, 2, 3), *steps, EpochTag(8, 4, 'ckpt_epoch_4')]
    gone = tags_to_prune(tags, [KeepNewest(2), KeepSteps(1)])
    assert gone == [
        'ckpt_epoch_0', 'ckpt_epoch_1', 'ckpt_epoch_2', 'ckpt_epoch_4_step_5', 'ckpt_epoch_4_step_6'
    ]  # fmt: skip
    assert 'ckpt_epoch_4_step_7' in tags_to_prune(tags, [KeepNewest(0), KeepSteps(0)])
    # Their accuracy is that of an epoch before, and their epoch is not done.
    assert tags_to_prune(steps, [KeepBest(1), KeepEvery(2), KeepNewest(1)]) == [
        'ckpt_epoch_4_step_5', 'ckpt_epoch_4_step_6'
    ]  # fmt: skip


def test_tags_of_later_training_stay_until_it_is_done_again():
    keep = [KeepNewest(1), KeepLater()]
    assert tags_to_prune(_tags(8, 9, 4), keep) == []
    assert tags_to_prune(_tags(8, 9, 4, 5), keep) == ['ckpt_epoch_4']
    # 8 was saved anew, and 9 is the last of the training that was left behind
    assert tags_to_prune(_tags(9, 7, 8), keep) == ['ckpt_epoch_7']
    assert tags_to_prune(_tags(9, 8, 10), keep) == ['ckpt_epoch_9', 'ckpt_epoch_8']
    # in order of training a step tag of an epoch comes before the epoch's own
    step = EpochTag(9, 9, 'ckpt_epoch_9_step_3', step=3)
    assert tags_to_prune([*_tags(8, 9), step], [KeepNewest(1), KeepLater()]) == ['ckpt_epoch_8']
    assert tags_to_prune([*_tags(8, 9), step], [KeepLater()]) == ['ckpt_epoch_8']


def test_inside_an_epoch_the_engines_updates_say_what_is_later():
    # Four ranks instead of two: step 21 comes after step 40.
    tags = [
        EpochTag(1, 3, 'ckpt_epoch_3_step_40', step=40, updates=340),
        EpochTag(2, 3, 'ckpt_epoch_3_step_21', step=21, updates=341),
    ]
    assert tags_to_prune(tags, [KeepSteps(1), KeepLater()]) == ['ckpt_epoch_3_step_40']
    rewound = tags[1]._replace(updates=321)
    assert tags_to_prune([tags[0], rewound], [KeepSteps(1), KeepLater()]) == []


def test_of_later_training_only_the_furthest_tags_stay_where_a_run_was_rewound_on_purpose():
    steps = [EpochTag(4, 9, 'ckpt_epoch_9_step_2', step=2), EpochTag(5, 4, 'ckpt_epoch_4')]
    tags = [*_tags(7, 8, 6), *steps]
    for most, gone in ((0, [7, 8, 6, 9]), (1, [7, 8, 6]), (2, [7, 6]), (9, [])):
        names = tags_to_prune(tags, [KeepLater(most)])
        assert [tag.epoch for tag in tags if tag.name in names] == gone


@pytest.mark.parametrize('explicit', [False, True])
def test_random_saves_and_rewinds_lose_no_later_training(explicit):
    """Without an explicit word a save removes nothing of later training; with one little stays."""
    seed = random.randrange(10**6)
    print(f'seed {seed}')
    for case in range(300):
        chance = random.Random(f'{seed} {case}')
        count, steps = chance.randint(1, 4), chance.randint(0, 3)
        most = count + steps
        plain = [KeepNewest(count), KeepSteps(steps)]
        policies = [*plain, KeepLater(most if explicit else None)]
        tags, epoch, step = {}, 0, 0
        for sequence in range(1, chance.randint(2, 60)):
            if tags and chance.random() < 0.15:  # go back to any tag that is there
                epoch, _, step = chance.choice(list(tags.values())).position
            if chance.random() < 0.3:
                step += chance.randint(1, 3)
                saved = EpochTag(sequence, epoch, f'ckpt_epoch_{epoch}_step_{step}', step=step)
            else:
                saved = EpochTag(sequence, epoch, f'ckpt_epoch_{epoch}')
                epoch, step = epoch + 1, 0
            tags[saved.name] = saved
            gone = tags_to_prune(tags.values(), policies)
            later = {name for name, tag in tags.items() if tag.position > saved.position}
            would_go = set(tags_to_prune(tags.values(), plain))
            assert saved.name not in gone
            if explicit:
                furthest = sorted(later, key=lambda name: tags[name].position)[-most:]
                assert not set(furthest) & set(gone)
                assert len(tags) - len(gone) <= 2 * most + 1
            else:
                assert not later & set(gone)
                assert set(gone) == would_go - later
            if not later:  # it has come as far as any run before: nothing more stays than ever
                assert set(gone) == would_go
            tags = {name: tag for name, tag in tags.items() if name not in gone}
