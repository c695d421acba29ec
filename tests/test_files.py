"""Files are replaced whole."""

import os

import pytest

from internvl_ds.files import write_text


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
