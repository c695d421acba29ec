"""A directory of trials: one tuner at a time, and the same settings."""

import os

import pytest

from internvl_ds.errors import ConfigError
from internvl_ds.tools.tune.session import alone, same_settings


def test_a_second_tuner_is_refused_and_the_next_is_not(tmp_path):
    folder = tmp_path / 'new' / 'tune'
    refused = pytest.raises(ConfigError, match=rf'process {os.getpid()} is tuning there')
    with alone(folder), refused, alone(folder):
        pass
    with alone(folder):
        pass


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    with (
        pytest.raises(ConfigError, match=r'file/tune: cannot be written to'),
        alone(tmp_path / 'file' / 'tune'),
    ):
        pass


def test_a_lock_that_is_no_file_is_refused(tmp_path):
    (tmp_path / 'mine').write_text('years of work')
    (tmp_path / '.lock').symlink_to('mine')
    with pytest.raises(ConfigError, match=r'\.lock'), alone(tmp_path):
        pass
    assert (tmp_path / 'mine').read_text() == 'years of work'


def test_other_settings_are_refused_by_name(tmp_path):
    settings = {
        '--cfg': {'DATA': {'BATCH_SIZE': 16, 'X': (1, 2)}},
        'launcher': ['a'],
        '--space': None,
    }
    same_settings(tmp_path, settings)
    same_settings(tmp_path, settings)
    changed = {
        **settings,
        '--cfg': {'DATA': {'BATCH_SIZE': 8, 'X': (1, 2)}},
        '--space': {'axes': 1},
    }
    with pytest.raises(ConfigError) as caught:
        same_settings(tmp_path, changed)
    text = str(caught.value)
    assert '--cfg/DATA/BATCH_SIZE was 16 and is 8' in text
    assert '--space was null and is {"axes": 1}' in text
    assert 'launcher' not in text
    assert 'Name another --output' in text
