"""Runs whose tags are on an S3 server too: moto's, on the loopback interface."""

import math
from importlib.util import find_spec

import pytest

from internvl_ds.checkpoint.choice import auto_resume_helper
from internvl_ds.checkpoint.mirror.store import Store
from internvl_ds.checkpoint.mirror.uploads import uploads
from internvl_ds.dist.group import current_group
from tests.checkpoint.mirror import mirroring, s3
from tests.checkpoint.mirror.tagging import config_of, save, upload, whole
from tests.checkpoint.mirror.test_mirror import require_gone_on
from tests.harness.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    not (find_spec('s3fs') and find_spec('moto')), reason="takes the extra 'dev': s3fs and moto"
)

ADDRESS = f's3://{s3.BUCKET}/runs/one'


@pytest.fixture(scope='module')
def endpoint():
    with s3.serving() as address:
        yield address


@pytest.fixture
def server(endpoint, monkeypatch):
    """The endpoint, an empty bucket there, and this process's environment for it."""
    for name, value in s3.environment(endpoint).items():
        monkeypatch.setenv(name, value)
    store = Store(f's3://{s3.BUCKET}')
    for name in store.names():
        store.remove(name)
    if not store._files.exists(s3.BUCKET):
        store._files.mkdir(s3.BUCKET)
    yield endpoint
    uploads()._close()
    for kind in [kind for kind in current_group().parts if kind.__name__ in ('_Uploads', '_Last')]:
        del current_group().parts[kind]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.soak_only  # what ranks do is the same with a directory: see test_mirror.py
def test_a_run_goes_on_from_a_bucket_bit_for_bit(tmp_path, server):
    found = run_ranks(
        mirroring.lose_and_go_on, 2, tmp_path, root=str(tmp_path), address=ADDRESS, stage=1,
        asynchronous=False, env=s3.environment(server),
    )  # fmt: skip
    require_gone_on(found, tmp_path)


def test_a_cut_connection_is_tried_again(tmp_path, server, monkeypatch):
    cut = s3.Cut(server, after=40_000, times=1)
    monkeypatch.setenv('AWS_ENDPOINT_URL', cut.endpoint)
    try:
        tag = save(tmp_path / 'out', 0)
        upload(tmp_path / 'out', ADDRESS, tag)
        assert cut.cuts == 1
        assert whole(ADDRESS) == [tag.name]
        config = config_of(tmp_path / 'new', ADDRESS)
        path = auto_resume_helper(str(tmp_path / 'new'), config=config)
        assert path == f'{tmp_path}/new/{tag.name}'
        for file in (file for file in tag.rglob('*') if file.is_file()):
            copy = tmp_path / 'new' / tag.name / file.relative_to(tag)
            assert copy.read_bytes() == file.read_bytes()
    finally:
        cut.close()


def test_connections_that_are_always_cut_are_one_warning(tmp_path, server, monkeypatch, caplog):
    from s3fs import S3FileSystem

    monkeypatch.setattr(S3FileSystem, 'retries', 1)
    cut = s3.Cut(server, after=40_000, times=math.inf)
    monkeypatch.setenv('AWS_ENDPOINT_URL', cut.endpoint)
    try:
        upload(tmp_path / 'out', ADDRESS, save(tmp_path / 'out', 0), wait=12)
    finally:
        cut.close()
    assert cut.cuts > 1
    lines = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    lines = [line for line in lines if ADDRESS in line]
    assert ['rank 0 cannot upload it' in line for line in lines] == [True, False], lines
    assert 'ckpt_epoch_0 not uploaded when the run ends' in lines[1]
    assert not any('\n' in line for line in lines)
    monkeypatch.setenv('AWS_ENDPOINT_URL', server)
    assert whole(ADDRESS) == []


def test_a_file_of_several_parts_comes_back(tmp_path, server):
    store = Store(f's3://{s3.BUCKET}/parts')
    content = bytes(range(256)) * (70_000)
    (tmp_path / 'large').write_bytes(content)
    with (tmp_path / 'large').open('rb') as file:
        store.put('large', file, len(content))
    with store.open('large') as (file, size):
        assert size == len(content)
        assert file.read() == content
    assert store.names() == ['large']
    assert store.read('large', 10) == content[:10]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.soak_only  # as above on one rank; the client waits long between its attempts
def test_training_goes_on_without_a_mirror(tmp_path, server):
    cut = s3.Cut(server, after=2_000, times=math.inf)
    try:
        found = run_ranks(
            mirroring.go_on_without, 2, tmp_path, root=str(tmp_path), address=ADDRESS,
            env=s3.environment(cut.endpoint),
        )  # fmt: skip
    finally:
        cut.close()
    assert cut.cuts > 3
    for got in found:
        assert got['latest'] == 'ckpt_epoch_1'
    lines = found[0]['warnings']
    assert not any('\n' in line for line in lines)
    assert any('rank 0 cannot upload it to s3://' in line for line in lines), lines
    assert 'not uploaded when the run ends' in lines[-1]
    assert whole(ADDRESS) == []
