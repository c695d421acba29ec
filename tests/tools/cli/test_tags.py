"""One bad entry in an OUTPUT is one bad line, whatever it is; the others are listed."""

import json
import os
import shutil
import time

import pytest

from internvl_ds.tools.cli import main
from tests.harness.tags import SHARD, save_tag


def dangling(path):
    path.symlink_to('nowhere')


def to_itself(path):
    path.symlink_to(path.name)


def to_zeros(path):
    path.symlink_to('/dev/zero')


def sparse(path):
    path.touch()
    os.truncate(path, 1 << 40)


def to_the_root(path):
    path.symlink_to('/')


def deep_json(path):
    path.write_text('[' * 100_000)


def long_text(path):
    path.write_text('x' * (5 << 20))


ODD = [dangling, to_itself, to_zeros, os.mkfifo, sparse, to_the_root, long_text, deep_json]


@pytest.fixture
def output(tmp_path):
    for epoch in range(3):
        save_tag(tmp_path, epoch, state={'epoch': epoch})
    return tmp_path


@pytest.fixture
def ckpt(capsys):
    def run(*words):
        start = time.monotonic()
        status = main(['ckpt', *map(str, words)])
        assert time.monotonic() - start < 5
        told = capsys.readouterr()
        return status, told.out + told.err

    return run


def lines_of(text, word):
    return [line for line in text.splitlines() if word in line]


def check(ckpt, output, tag):
    """Both commands: one DAMAGED line, of this tag; the other tags are well."""
    for words in (('list', output), ('list', output, '--verify'), ('verify', output, '--all')):
        status, text = ckpt(*words)
        assert status == 1, text
        (line,) = lines_of(text, 'DAMAGED')
        assert tag in line
        assert len(lines_of(text, 'ckpt_epoch_')) >= 3, text


@pytest.mark.parametrize('odd', ODD)
@pytest.mark.parametrize('name', [SHARD, 'manifest.json', 'state.json'])
def test_an_odd_file_in_a_tag_is_damage_of_that_tag(ckpt, output, odd, name):
    (output / 'ckpt_epoch_1' / name).unlink()
    odd(output / 'ckpt_epoch_1' / name)
    check(ckpt, output, 'ckpt_epoch_1')
    status, text = ckpt('show', output, 'ckpt_epoch_1')
    assert status == 1, text
    assert ckpt('verify', output / 'ckpt_epoch_1')[0] == 1
    assert ckpt('verify', output)[0] == 0  # what auto resume takes is whole


@pytest.mark.parametrize('odd', [dangling, to_itself, to_zeros, os.mkfifo, sparse, long_text])
@pytest.mark.parametrize('name', ['ckpt_epoch_1', 'ckpt_epoch_best'])
def test_what_stands_in_the_place_of_a_tag_is_damage_of_that_tag(ckpt, output, odd, name):
    shutil.rmtree(output / name, ignore_errors=True)
    odd(output / name)
    check(ckpt, output, name)


@pytest.mark.parametrize('odd', [dangling, to_itself, to_zeros, os.mkfifo, to_the_root, sparse])
@pytest.mark.parametrize('name', ['notes', 'file.pth', 'ckpt_epoch_1/more', 'ckpt_epoch_1/d'])
def test_what_belongs_to_no_tag_is_no_damage_and_is_not_followed(ckpt, output, odd, name):
    odd(output / name)
    for words in (('list', output), ('verify', output, '--all')):
        status, text = ckpt(*words)
        assert status == 0, text
        assert len(lines_of(text, 'ckpt_epoch_')) == 3


@pytest.mark.parametrize('odd', [*ODD, os.mkdir])
def test_a_latest_that_is_none_is_passed_over_and_told(ckpt, output, odd):
    (output / 'latest').unlink()
    odd(output / 'latest')
    status, text = ckpt('list', output)
    assert status == 0
    assert 'resuming from ckpt_epoch_2 instead' in text


@pytest.mark.parametrize(
    'content', ['../ckpt_epoch_2', '/etc', '..', 'a\0b', '\x1b[2J', 'x' * 300, 'a\nb']
)
def test_a_latest_that_names_no_tag_beside_it_is_not_followed(ckpt, output, content):
    (output / 'latest').write_text(content)
    _, text = ckpt('list', output)
    assert 'which is no tag beside it: resuming from ckpt_epoch_2 instead' in text
    assert '\x1b' not in text


@pytest.mark.parametrize(
    'name', ['ckpt_epoch_\x1b[2J', 'ckpt_epoch_\u202ex', 'ckpt_epoch_\udcff', 'ckpt_epoch_a\nb']
)
def test_names_are_shown_without_what_a_terminal_would_obey(ckpt, output, name):
    shutil.copytree(output / 'ckpt_epoch_0', output / name)
    (output / name / SHARD).write_text('x')
    for words in (('list', output), ('verify', output, '--all'), ('show', output, 'gone')):
        _, text = ckpt(*words)
        assert not set('\x1b\u202e\udcff') & set(text)
        shown = name.encode('unicode_escape').decode()
        assert shown in text
    tags = json.loads(ckpt('list', output, '--json')[1])['tags']
    assert name in [tag['tag'] for tag in tags]
