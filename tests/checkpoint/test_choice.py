"""Which checkpoint a load takes: MODEL.RESUME or what OUTPUT holds. Real files, one process."""

import logging
import shutil

import pytest
import torch
from yacs.config import CfgNode

from internvl_ds import auto_resume_helper
from internvl_ds.checkpoint.choice import choose, newer_than_best
from internvl_ds.errors import CheckpointError, CheckpointNotFound
from tests.harness.model import make_config
from tests.harness.tags import SHARD, save_tag

logger = logging.getLogger('test')


@pytest.fixture
def other(tmp_path):
    return tmp_path / 'other'


@pytest.fixture
def output(tmp_path):
    return tmp_path / 'output'


def _config(output, resume, **values):
    return make_config(str(output), MODEL__RESUME=str(resume), **values)


def _choose(output, resume, **values):
    return choose(_config(output, resume, **values), logger)


def _from(resume):
    """The state of a tag whose run went on from there."""
    return {'config': make_config('', MODEL__RESUME=str(resume)).dump()}


def test_a_tag_further_in_training_goes_before_it(output, other, caplog):
    asked, own = save_tag(other, 0), save_tag(output, 12)
    assert _choose(output, asked) == own
    assert f'{own} goes before MODEL.RESUME {asked}, as the newer' in caplog.text
    assert 'TRAIN.AUTO_RESUME False would keep MODEL.RESUME' in caplog.text
    step = save_tag(output, 13, step=1)
    assert _choose(output, asked) == step
    assert _choose(output, save_tag(other, 12)) == step  # the first update after epoch 12
    assert _choose(output, save_tag(other, 13, step=1)) != step
    assert _choose(output, save_tag(other, 13)) != step  # inside epoch 13, which that has done
    caplog.clear()
    assert _choose(output, step) == step  # the newest itself is no newer one
    assert caplog.text == ''


def test_without_auto_resume_it_is_what_was_asked_for(output, other, caplog):
    asked, own = save_tag(other, 0), save_tag(output, 12)
    assert _choose(output, asked, TRAIN__AUTO_RESUME=False) == asked
    assert f'MODEL.RESUME {asked} is taken, and not the newer {own}' in caplog.text
    rewound = save_tag(output, 14)
    caplog.clear()
    assert _choose(output, own, TRAIN__AUTO_RESUME=False) == own
    assert f'and not the newer {rewound}: TRAIN.AUTO_RESUME is False' in caplog.text


def test_an_evaluation_takes_exactly_what_was_asked_for(output, other, caplog):
    asked = save_tag(other, 0)
    save_tag(output, 12)
    assert _choose(output, asked, EVAL_MODE=True) == asked
    assert caplog.text == ''


def test_a_tag_that_is_no_further_does_not_go_before_it(output, other, caplog):
    asked = save_tag(other, 20)
    for epoch in (5, 20):
        save_tag(output, epoch)
        assert _choose(output, asked) == asked
    assert caplog.text == ''


def test_a_run_that_went_on_from_it_goes_before_it_however_far_that_is_by_now(output, other):
    asked = save_tag(other, 0, best='best')
    own = save_tag(output, 1, state=_from(asked))
    save_tag(other, 7, best='best')  # the other run goes on meanwhile
    assert _choose(output, asked) == own
    assert _choose(output, f'{other}/../other/ckpt_epoch_best/') == own
    save_tag(output, 2)
    assert _choose(output, asked) == asked  # saved by a run that did not


def test_another_output_directory_means_its_newest_tag(output, other):
    save_tag(other, 0)
    own = save_tag(output, 5)
    assert _choose(output, other) == own
    further = save_tag(other, 6)
    assert _choose(output, other) == further
    assert _choose(output, output) == own


def test_in_one_directory_the_tag_saved_last_is_the_newest(output, caplog):
    first, second = save_tag(output, 3), save_tag(output, 9)
    assert _choose(output, first) == second
    assert f'{second} goes before MODEL.RESUME {first}' in caplog.text
    caplog.clear()
    assert _choose(output, second) == second
    best = save_tag(output, 10, best='best')  # killed before epoch 10 was saved
    assert _choose(output, best) == best
    rewound = save_tag(output, 4)
    assert _choose(output, second) == rewound
    assert _choose(output, rewound) == rewound


def test_what_is_gone_is_no_matter_where_output_is_further(output, other):
    own = save_tag(output, 5, state=_from(other / 'ckpt_epoch_best'))
    assert _choose(output, other / 'ckpt_epoch_2') == own  # its run has removed it
    assert _choose(output, output / 'ckpt_epoch_2') == own
    assert _choose(output, other / 'ckpt_epoch_best') == own
    for missing in (other / 'ckpt_epoch_9', output / 'ckpt_epoch_9', other / 'nowhere' / 'x'):
        with pytest.raises(CheckpointNotFound, match=f'{missing}: no such checkpoint'):
            _choose(output, missing)


def test_an_originals_file_is_compared_by_its_epoch(output, other):
    other.mkdir()
    file, own = other / 'some.pth', save_tag(output, 5)
    for epoch, expected in ((4, own), (5, file), (9, file)):
        torch.save({'epoch': epoch, 'model': {}}, file)
        assert _choose(output, file) == expected
    file.write_text('no checkpoint')
    assert _choose(output, file) == file  # the load says why
    torch.save({'epoch': 9, 'model': {}}, file)
    own = save_tag(output, 6, state=_from(file))
    assert _choose(output, file) == own


def test_what_cannot_be_compared_gives_way_to_a_run_of_this_output_only(output, other):
    url = 'https://example.org/some.pth'
    plain = other / 'global_step7'
    plain.mkdir(parents=True)
    (plain / SHARD).touch()
    save_tag(output, 5)
    assert _choose(output, url) is None
    assert _choose(output, plain) == plain
    for resume in (url, plain):
        own = save_tag(output, 6, state=_from(resume))
        assert _choose(output, resume) == own
    own = save_tag(output, 7, state=_from(output / 'ckpt_epoch_6'))  # by auto resume
    assert _choose(output, url) == _choose(output, plain) == own


def test_damaged_tags_of_output_are_passed_over(output, other, caplog):
    asked, second, third = save_tag(other, 0), save_tag(output, 1), save_tag(output, 2)
    (third / SHARD).write_text('WEIGHTS')  # of the same size
    assert _choose(output, asked) == second
    assert f'{third / SHARD}: damaged' in caplog.text
    (second / SHARD).unlink()
    caplog.clear()
    assert _choose(output, asked) == asked
    assert 'no whole one is left' in caplog.text
    assert f'It is set: {asked} is taken' in caplog.text
    with pytest.raises(CheckpointError, match=f'{SHARD} is missing'):
        _choose(output, second)  # asked for by its name


def test_a_tag_saved_as_best_is_taken_where_output_has_no_other(output, other, caplog):
    asked, own = save_tag(other, 0), save_tag(output, 1, best='best')
    assert _choose(output, asked) == own
    assert 'resuming from ckpt_epoch_best instead' in caplog.text


def test_an_output_without_tags_changes_nothing(output, other):
    asked = save_tag(other, 0)
    assert _choose(output, asked) == _choose('', asked) == asked
    output.mkdir()
    (output / 'ckpt_epoch_9.pth').touch()
    assert _choose(output, asked) == asked


def test_a_tree_without_the_keys_of_the_original_resumes_too(other):
    asked, newer = save_tag(other, 0), save_tag(other, 1)
    bare = CfgNode({'MODEL': {'RESUME': str(asked)}})
    assert choose(bare, logger) == asked
    bare.OUTPUT = str(other)
    assert choose(bare, logger) == newer


def test_an_average_is_of_the_tag_that_the_weights_are_of(output, other):
    asked, first = save_tag(other, 0), save_tag(output, 1)
    config = _config(output, asked)
    assert choose(config, logger) == first
    second = save_tag(output, 2)  # by whom ever
    assert choose(config, logger, as_before=True) == first
    assert choose(config.clone(), logger, as_before=True) == first
    assert choose(_config(output, other), logger, as_before=True) == second
    assert choose(config, logger) == second
    shutil.rmtree(second)
    assert choose(config, logger, as_before=True) == first


def test_auto_resume_takes_the_limits_of_a_configuration(output):
    assert auto_resume_helper(str(output), config=make_config('')) is None
    assert auto_resume_helper(str(output), config=CfgNode()) is None
    assert auto_resume_helper(str(save_tag(output, 0).parent)) == str(output / 'ckpt_epoch_0')


def test_a_best_of_output_is_taken_as_asked_by_a_load_and_not_by_a_run_started_again(output):
    best = save_tag(output, 3, best='best')
    config = _config(output, best)
    assert newer_than_best(config) is None
    newer = save_tag(output, 4)
    assert choose(config, logger) == best
    assert newer_than_best(config) == str(newer)
    assert newer_than_best(_config(output, newer)) is None
    assert newer_than_best(_config(output.with_name('another'), best)) is None
