"""Files from outside: what is opened, how much of it is read, and what it may unfold to."""

import json
import os
import tempfile
import time
from pathlib import Path

import pytest

from internvl_ds.checkpoint.sources.open_weights import open_weights
from internvl_ds.checkpoint.tag.discovery import newest, resolve
from internvl_ds.config.tree import default_config
from internvl_ds.errors import (
    CheckpointError,
    ConfigError,
    InternvlDsError,
    brief,
    printable,
    shown,
)
from internvl_ds.files.reading import (
    Unreadable,
    interpreting,
    open_data,
    parse_json,
    read_text,
    require_bounded,
)
from internvl_ds.files.yaml_text import parse_yaml
from internvl_ds.tools.cli import main
from internvl_ds.tools.cli.digits import write_digits
from internvl_ds.train.data import build_loaders


@pytest.mark.parametrize('target', ['/dev/zero', '/dev/tty', '/dev/stdin', 'fifo'])
def test_only_regular_files_are_opened_and_nobody_is_waited_for(tmp_path, target):
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'link').symlink_to(target)
    start = time.monotonic()
    with pytest.raises((Unreadable, OSError)):
        open_data(tmp_path / 'link')
    assert time.monotonic() - start < 2


def test_a_fifo_and_a_folder_are_named(tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    with pytest.raises(Unreadable, match='is a FIFO, and only regular files are read'):
        open_data(tmp_path / 'fifo')
    with pytest.raises(IsADirectoryError):
        open_data(tmp_path)
    with pytest.raises(Unreadable, match='NUL'):
        open_data('a\0b')


def test_a_link_is_followed_but_for_a_file_of_ours_that_nothing_vouches_for(tmp_path):
    (tmp_path / 'file').write_text('text')
    (tmp_path / 'link').symlink_to('file')
    assert read_text(tmp_path / 'link', 10) == 'text'
    assert read_text(tmp_path / 'file', 10, ours=True) == 'text'
    with pytest.raises(Unreadable, match='is a symbolic link'):
        read_text(tmp_path / 'link', 10, ours=True)


def test_a_file_that_is_too_long_is_refused_by_its_size(tmp_path):
    (tmp_path / 'file').touch()
    os.truncate(tmp_path / 'file', 1 << 40)
    start = time.monotonic()
    with pytest.raises(Unreadable, match='has 1099511627776 bytes, and such a file has 10 at most'):
        read_text(tmp_path / 'file', 10)
    assert time.monotonic() - start < 2
    with pytest.raises(Unreadable, match='such a file has 3 at most'):  # says that it has none
        read_text('/proc/self/status', 3)
    assert read_text('/proc/self/status', 1 << 16).startswith('Name:')


@pytest.mark.parametrize(
    ('text', 'why'),
    [
        ('[' * 65 + ']' * 65, 'deeper than 64 levels'),
        ('[' * 100_000, 'deeper than 64 levels'),
        ('1' + '0' * 400, 'an integer of 1329 bits'),
        ('[' + '[],' * 2_000_000 + '[]]', 'would take'),
        ('{', 'Expecting'),
    ],
)
def test_json_that_is_no_measure_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_json_of_the_largest_kinds_in_use_is_read():
    assert parse_json(json.dumps(list(range(1_000_000))))[-1] == 999_999  # an order of images
    files = {f'zero_pp_rank_{i}_mp_rank_00_optim_states.pt': [i, 'f' * 32] for i in range(50_000)}
    assert len(parse_json(json.dumps({'files': files}))['files']) == 50_000
    assert parse_json('[' * 60 + ']' * 60)


def _doubled(first, line):
    return first + ''.join(line.format(i, i - 1) for i in range(1, 40))


@pytest.mark.parametrize(
    'text',
    [
        _doubled('a0: &a0 [x, x]\n', 'a{0}: &a{0} [*a{1}, *a{1}]\n'),
        _doubled('a0: &a0 {k: 1}\n', 'a{0}: &a{0} {{<<: [*a{1}, *a{1}]}}\n'),
        'a: &a [*a]',
        '[' * 10_000,
        'a: 2001-99-99',
        'a: !!int x',
        'a: !!timestamp x',
        'a: 1' + ':1' * 100_000,
        '#' * 300_000,
        '!!python/object/apply:os.system [":"]',
        'a: [',
    ],
)
def test_yaml_that_is_none_or_grows_is_one_error_in_one_line(text):
    start = time.monotonic()
    with pytest.raises(Unreadable) as raised:
        parse_yaml(text)
    assert '\n' not in str(raised.value)
    assert time.monotonic() - start < 2


def test_yaml_with_aliases_and_merges_of_measure_is_read():
    assert parse_yaml('a: &a {x: 1}\nb: {<<: *a, y: 0x10}\nc: *a') == {
        'a': {'x': 1}, 'b': {'x': 1, 'y': 16}, 'c': {'x': 1},
    }  # fmt: skip


def test_shared_containers_count_as_often_as_they_are_named():
    shared = [1, 2]
    require_bounded([shared] * 10, 50)
    with pytest.raises(Unreadable, match='more than 20 values'):
        require_bounded([shared] * 10, 20)
    value: list = []
    for _ in range(40):
        value = [value, value]
    start = time.monotonic()
    with pytest.raises(Unreadable, match='references followed'):
        require_bounded(value)
    assert time.monotonic() - start < 2
    value = []
    value.append(value)
    with pytest.raises(Unreadable, match='inside itself'):
        require_bounded(value)


def test_what_a_name_would_do_to_a_terminal_is_escaped():
    assert printable('a\x1b[2J\x9b\u202eb\udcff\n\u00e9') == 'a\\x1b[2J\\x9b\\u202eb\\udcff\n\u00e9'
    assert shown('a\nb\tc') == 'a\\nb\\tc'
    assert str(ConfigError('a\x07')) == 'a\\x07'
    assert len(str(ConfigError('x' * 10**6))) < 11_000
    assert len(brief({'a': 'x' * 10**6})) < 200


@pytest.mark.parametrize('error', [KeyError('a'), StopIteration('a'), RuntimeError('a')])
def test_an_odd_value_in_a_file_is_an_error_of_the_file(error):
    with (
        pytest.raises(CheckpointError, match=rf"^file: .*{type(error).__name__}: '?a'?"),
        interpreting('file', CheckpointError),
    ):
        raise error
    with pytest.raises(ConfigError), interpreting('file', CheckpointError):
        raise ConfigError('told already')


@pytest.mark.skipif(os.geteuid() != 0, reason='becomes another user')
def test_a_folder_without_rights_is_an_error_of_this_package():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        closed = Path(folder, 'closed')
        closed.mkdir(0)
        Path(folder, 'val').mkdir(0)

        def of(images):
            config = default_config()
            config.DATA.DATA_PATH = str(images)
            return config

        reads = {
            'newest': lambda: newest(closed),
            'newest below': lambda: newest(closed / 'out'),
            'resolve': lambda: resolve(str(closed / 'tag')),
            'weights': lambda: open_weights(str(closed)),
            'digits': lambda: write_digits(closed),
            'digits below': lambda: write_digits(closed / 'digits'),
            'list': lambda: main(['ckpt', 'list', str(closed)]),
            'images': lambda: build_loaders(of(folder), 0, 1),
            'images below': lambda: build_loaders(of(closed), 0, 1),
        }
        child = os.fork()
        if not child:
            os.setuid(65534)
            wrong = 0
            for name, read in reads.items():
                try:
                    wrong += read() != 2
                except InternvlDsError:
                    pass
                except BaseException as error:
                    print(name, repr(error))
                    wrong += 1
            os._exit(wrong)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
