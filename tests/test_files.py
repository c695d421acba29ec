"""Files are replaced whole."""

import os

import pytest
import torch
from safetensors.torch import load_file

from internvl_ds.files import write_safetensors, write_text


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


def test_safetensors_are_as_readable_as_their_folder(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    tmp_path.chmod(0o755)
    write_safetensors({'a': whole, 'b': whole.T}, tmp_path / 'x.safetensors', {'decay': '0.9'})
    assert (tmp_path / 'x.safetensors').stat().st_mode & 0o777 == 0o644
    back = load_file(tmp_path / 'x.safetensors')
    assert torch.equal(back['a'], whole)
    assert torch.equal(back['b'], whole.T)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / 'no' / 'latest', 'x')
