"""What CHECKPOINT.MIRROR may be."""

import importlib.util
from argparse import Namespace

import pytest

from internvl_ds.config.ds.check import check
from internvl_ds.config.mirror import mirror_of
from internvl_ds.config.tree import get_config
from internvl_ds.errors import ConfigError
from tests.harness.model import make_config


def config_of(tmp_path, address, **more):
    return make_config(str(tmp_path / 'out'), CHECKPOINT__MIRROR=address, **more)


def test_nothing_is_no_mirror_and_a_slash_at_the_end_is_none(tmp_path):
    assert mirror_of(config_of(tmp_path, '')) == ''
    assert mirror_of(config_of(tmp_path, f'file://{tmp_path}/m/')) == f'file://{tmp_path}/m'


@pytest.mark.parametrize(
    ('address', 'reason'),
    [
        ('ftp://host/dir', 'it takes file://..., s3://..., gs://..., or nothing'),
        ('/a/path', 'it takes file://'),
        ('file://relative', 'a path begins with a slash'),
        ('s3:///dir', 'it takes a bucket; credentials come from the environment'),
        ('s3://key:secret@bucket/dir', 'credentials come from the environment'),
        ('s3://bucket/dir?versionId=1', 'credentials come from the environment'),
        ('OUT', 'it is OUTPUT'),
        ('OUT/below', 'or lies in it, and would be lost with it'),
        ('OUT/../link', 'it is OUTPUT'),
    ],
)
def test_what_cannot_be_one_is_refused_by_name(tmp_path, monkeypatch, address, reason):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
    (tmp_path / 'out').mkdir()
    (tmp_path / 'link').symlink_to('out')
    config = config_of(tmp_path, address.replace('OUT', f'file://{tmp_path}/out'))
    with pytest.raises(ConfigError, match='CHECKPOINT.MIRROR') as error:
        mirror_of(config)
    assert reason in str(error.value)
    assert 'secret' not in str(error.value)
    (finding,) = check({}, config, world_size=1)
    assert str(finding) == str(error.value)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=r"package s3fs, .* pip install 'internvl_ds\[mirror\]'"):
        mirror_of(config_of(tmp_path, 's3://bucket'))
    with pytest.raises(ConfigError, match='package gcsfs, .* pip install gcsfs'):
        mirror_of(config_of(tmp_path, 'gs://bucket'))


def test_it_is_of_one_job(tmp_path):
    config = config_of(tmp_path, f'file://{tmp_path}/m', CHECKPOINT__SHARED_OUTPUT=True)
    with pytest.raises(ConfigError, match=r'CHECKPOINT\.SHARED_OUTPUT lets several write'):
        mirror_of(config)


def test_experiments_have_their_own_as_they_have_their_own_output():
    opts = ['CHECKPOINT.MIRROR', 's3://bucket/runs/']
    config = get_config(Namespace(cfg='digits_quickstart', opts=opts, tag='second'))
    assert config.OUTPUT == 'output/digits_quickstart/second'
    assert config.CHECKPOINT.MIRROR == 's3://bucket/runs/digits_quickstart/second'
    assert get_config(Namespace(cfg='digits_quickstart')).CHECKPOINT.MIRROR == ''
