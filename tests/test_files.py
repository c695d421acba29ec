"""Files are replaced whole."""

import logging
import os

import pytest

from internvl_ds.files import for_show, write_text


def test_the_new_text_replaces_the_old_and_nothing_is_left_aside(tmp_path):
    path = tmp_path / 'latest'
    for text in ('ckpt_epoch_1', 'ä'):
        write_text(path, text)
        assert path.read_text(encoding='utf-8') == text
    assert os.listdir(tmp_path) == ['latest']


def test_a_reader_that_has_the_old_file_open_keeps_it(tmp_path):
    path = tmp_path / 'latest'
    write_text(path, 'old')
    with path.open() as reader:
        write_text(path, 'new and longer')
        assert reader.read() == 'old'


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / 'no' / 'latest', 'x')


def test_a_file_that_cannot_be_replaced_stays_and_nothing_is_left_aside(tmp_path):
    path = tmp_path / 'latest'
    path.mkdir()
    with pytest.raises(OSError, match='latest'):
        write_text(path, 'x')
    assert os.listdir(tmp_path) == ['latest']


def test_what_is_only_for_show_may_fail_and_says_so_once(tmp_path, caplog):
    logger = logging.getLogger('test')
    path = tmp_path / 'none' / 'x'
    for _ in range(2):
        with for_show(path, logger):
            path.write_text('x')
    with for_show(tmp_path / 'curves.png', logger):
        raise ValueError('an odd number')
    with for_show(tmp_path / 'y', logger):
        (tmp_path / 'y').write_text('y')
    assert (tmp_path / 'y').read_text() == 'y'
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(': ')[0] for line in said] == [str(path), str(tmp_path / 'curves.png')]
    assert 'cannot be written (FileNotFoundError: ' in said[0]
    assert 'cannot be written (ValueError: an odd number): the run goes on without it' in said[1]
