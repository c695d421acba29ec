"""Tag names and manifests: pure."""

import pytest

from internvl_ds.checkpoint.manifest import (
    FORMAT,
    Manifest,
    epoch_of,
    parse_manifest,
    tag_name,
    wrong_files,
)
from internvl_ds.errors import CheckpointError

MANIFEST = Manifest(
    tag='ckpt_epoch_3', epoch=3, sequence=2, zero_stage=1, world_size=2, precision='fp32',
    global_steps=40, files={'a.pt': 10, 'b.pt': 20},
)  # fmt: skip


def test_names():
    assert tag_name(7, None) == 'ckpt_epoch_7'
    assert tag_name(7, 'best') == 'ckpt_epoch_best'
    assert tag_name('warm', None) == 'ckpt_epoch_warm'
    assert epoch_of('ckpt_epoch_12') == 12
    for name in ('ckpt_epoch_best', 'ckpt_epoch_', 'ckpt_epoch_1x', 'ckpt_epoch_01', 'other_1'):
        assert epoch_of(name) is None


@pytest.mark.parametrize('best', ['../x', '7', '', 'a/b', '.hidden'])
def test_a_name_that_is_no_plain_file_name_is_refused(best):
    with pytest.raises(CheckpointError, match='a tag is named by letters'):
        tag_name(1, best)


def test_a_negative_epoch_is_refused():
    with pytest.raises(CheckpointError, match='epoch is -1'):
        tag_name(-1, None)


def test_a_manifest_reads_back():
    assert parse_manifest(MANIFEST.to_json(), 'x') == MANIFEST


def test_what_is_no_manifest_is_refused():
    with pytest.raises(CheckpointError, match='x: not a checkpoint manifest'):
        parse_manifest([], 'x')
    with pytest.raises(CheckpointError, match="x: the manifest lacks 'tag'"):
        parse_manifest({'format': 1}, 'x')
    newer = {**MANIFEST.to_json(), 'format': FORMAT + 1}
    with pytest.raises(CheckpointError, match='upgrade internvl_ds'):
        parse_manifest(newer, 'x')


def test_wrong_files_are_named():
    assert wrong_files(MANIFEST, {'a.pt': 10, 'b.pt': 20, 'more': 1}) == []
    assert wrong_files(MANIFEST, {'a.pt': 9}) == ['a.pt has 9 bytes, not 10', 'b.pt is missing']
