"""What MODEL.RESUME may name, by load_checkpoint. One process."""

import logging

import pytest

from internvl_ds import load_checkpoint
from internvl_ds.errors import CheckpointError, CheckpointNotFound
from tests.harness.model import make_config, make_model
from tests.harness.tags import SHARD, save_tag

logger = logging.getLogger('test')


def _load(path):
    config = make_config(EVAL_MODE=True, MODEL__RESUME=str(path))
    return load_checkpoint(config, make_model(1), None, None, None, logger)


def test_a_directory_without_any_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointNotFound, match=f'{tmp_path}: a directory without any checkpoint'):
        _load(tmp_path)


def test_an_empty_name_is_refused():
    with pytest.raises(CheckpointNotFound, match='RESUME is empty'):
        _load('')


def test_of_an_output_directory_the_newest_undamaged_tag_is_taken(tmp_path, caplog):
    first, second = save_tag(tmp_path, 0), save_tag(tmp_path, 1)
    (second / SHARD).write_text('WEIGHTS')  # of the same size
    with pytest.raises(CheckpointError, match=f'{first}'):  # text is no weights
        _load(tmp_path)
    assert f'{second / SHARD}: damaged' in caplog.text
    assert 'resuming from ckpt_epoch_0 instead' in caplog.text
