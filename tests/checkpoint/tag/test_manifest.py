"""Tag names and manifests: pure."""

import dataclasses
import json

import pytest

from internvl_ds.checkpoint.tag.manifest import (
    FORMAT,
    FORMAT_LINKED,
    HEADER_BYTES,
    FileEntry,
    Manifest,
    epoch_of,
    file_rank,
    parse_header,
    parse_manifest,
    step_of,
    tag_name,
    wrong_files,
)
from internvl_ds.errors import CheckpointError
from tests.harness.tags import make_header

FILES = {'a.pt': FileEntry(10, 'a' * 32), 'b.pt': FileEntry(20, 'b' * 32)}
HEADER = make_header(
    'ckpt_epoch_3', 3, 2, max_accuracy=71.25, size=30, versions={'torch': '2.9.0', 'ä': '"\\'}
)
MANIFEST = Manifest(HEADER, FILES)


def _with(**values):
    return json.dumps({**json.loads(MANIFEST.to_text()), **values})


def test_names():
    assert tag_name(7, None) == 'ckpt_epoch_7'
    assert tag_name(7, 'best') == 'ckpt_epoch_best'
    assert tag_name('warm', None) == 'ckpt_epoch_warm'
    assert epoch_of('ckpt_epoch_12') == 12
    assert tag_name(7, None, 40) == 'ckpt_epoch_7_step_40'
    assert (epoch_of('ckpt_epoch_7_step_40'), step_of('ckpt_epoch_7_step_40')) == (7, 40)
    assert step_of('ckpt_epoch_7') is step_of('ckpt_epoch_best') is None
    for name in (
        'ckpt_epoch_best',
        'ckpt_epoch_7_step_0',
        'ckpt_epoch_',
        'ckpt_epoch_1x',
        'ckpt_epoch_01',
        'other_1',
    ):
        assert epoch_of(name) is None


@pytest.mark.parametrize('best', ['../x', '7', '', 'a/b', '.hidden'])
def test_a_name_that_is_no_plain_file_name_is_refused(best):
    with pytest.raises(CheckpointError, match='a tag is named by letters'):
        tag_name(1, best)


@pytest.mark.parametrize(('epoch', 'step'), [(3, 0), ('warm', 4)])
def test_a_step_is_one_of_an_epoch(epoch, step):
    with pytest.raises(CheckpointError, match='a step is one of an epoch'):
        tag_name(epoch, None, step)


def test_a_negative_epoch_is_refused():
    with pytest.raises(CheckpointError, match='epoch is -1'):
        tag_name(-1, None)


def test_the_rank_of_a_file():
    assert file_rank('bf16_zero_pp_rank_12_mp_rank_00_optim_states.pt') == 12
    assert file_rank('zero_pp_rank_3_mp_rank_00_model_states.pt') == 3
    assert file_rank('ema_rank_7.safetensors') == 7
    for shared in ('mp_rank_00_model_states.pt', 'state.json', 'zero_to_fp32.py'):
        assert file_rank(shared) == 0


def test_a_manifest_reads_back():
    assert parse_manifest(MANIFEST.to_text(), 'x') == MANIFEST
    warm = Manifest(make_header('ckpt_epoch_warm', None, max_accuracy=0.1 + 0.2), {})
    assert parse_manifest(warm.to_text(), 'x') == warm


def test_a_header_is_read_from_the_front_of_a_manifest_of_many_files():
    names = [f'bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt' for r in range(3000)]
    text = Manifest(HEADER, {name: FileEntry(1 << 40, 'c' * 32) for name in names}).to_text()
    assert len(text) > 50 * HEADER_BYTES
    assert parse_header(text[:HEADER_BYTES], 'x') == HEADER


def test_a_header_of_a_manifest_without_files_or_of_a_short_one_is_read_too():
    for files in ({}, FILES):
        assert parse_header(Manifest(HEADER, files).to_text()[:HEADER_BYTES], 'x') == HEADER


def test_a_header_that_is_longer_than_the_front_is_left_to_the_whole_manifest():
    long = dataclasses.replace(HEADER, versions={'torch': '2' * HEADER_BYTES})
    assert parse_header(Manifest(long, FILES).to_text()[:HEADER_BYTES], 'x') is None


def test_a_manifest_written_in_another_layout_has_its_header_left_to_the_whole_text():
    assert parse_header(json.dumps(json.loads(MANIFEST.to_text())), 'x') is None


def test_what_is_no_manifest_is_refused():
    for text in ('[]', '', '{', 'null', '{}', '{"format": "2"}', MANIFEST.to_text()[:-3]):
        with pytest.raises(CheckpointError, match='x: not a checkpoint manifest'):
            parse_manifest(text, 'x')
    with pytest.raises(CheckpointError, match="x: the manifest lacks 'tag'"):
        parse_manifest(f'{{"format": {FORMAT}}}', 'x')


def test_another_format_is_refused_with_what_to_do():
    for parse, text in ((parse_manifest, _with), (parse_header, _front_with)):
        with pytest.raises(CheckpointError, match=r'x: manifest format 5, .* upgrade internvl_ds'):
            parse(text(format=FORMAT_LINKED + 1), 'x')
        with pytest.raises(CheckpointError, match=r'x: manifest format 1, of a development'):
            parse(text(format=FORMAT - 1), 'x')


def _front_with(**values):
    return Manifest(dataclasses.replace(HEADER, **values), FILES).to_text()


def test_a_changed_value_is_damage():
    with pytest.raises(CheckpointError, match='x: damaged: its own xxh3-128 is another'):
        parse_manifest(MANIFEST.to_text().replace('71.25', '72.25'), 'x')
    with pytest.raises(CheckpointError, match='x: damaged'):
        parse_manifest(_with(sequence=9), 'x')


@pytest.mark.parametrize('bit', range(7))
def test_one_flipped_character_is_refused_wherever_it_is(bit):
    text = MANIFEST.to_text()
    read = []
    for at, character in enumerate(text):
        flipped = text[:at] + chr(ord(character) ^ (1 << bit)) + text[at + 1 :]
        try:
            read.append((at, parse_manifest(flipped, 'x')))
        except CheckpointError:
            continue
    assert read == []


def test_a_manifest_cut_off_anywhere_is_refused():
    text = MANIFEST.to_text()
    for end in range(len(text)):
        with pytest.raises(CheckpointError):
            parse_manifest(text[:end], 'x')


def test_wrong_files_are_named():
    assert wrong_files(FILES, {'a.pt': 10, 'b.pt': 20, 'more': 1}) == []
    assert wrong_files(FILES, {'a.pt': 9}) == ['a.pt has 9 bytes, not 10', 'b.pt is missing']


@pytest.mark.parametrize('name', ['', '.', '..', 'a/../b', '/a', 'a//b', 'a\0b'])
def test_a_name_that_is_no_file_of_a_tag_is_refused(name):
    text = Manifest(HEADER, {name: FileEntry(1, 'a' * 32)}).to_text()
    with pytest.raises(CheckpointError, match='which is no file of a tag'):
        parse_manifest(text, 'here')


@pytest.mark.parametrize('entry', [(-1, 'a'), (True, 'a'), (1.5, 'a'), (1 << 63, 'a'), (1, 2)])
def test_a_size_that_is_no_count_is_refused(entry):
    text = Manifest(HEADER, {'a.pt': FileEntry(*entry)}).to_text()
    with pytest.raises(CheckpointError, match=r'a\.pt has \['):
        parse_manifest(text, 'here')


@pytest.mark.parametrize(
    ('field', 'value'),
    [('world_size', 0), ('zero_stage', 4), ('zero_stage', -1), ('sequence', True), ('tag', 3)],
)
def test_a_header_with_a_value_of_another_kind_is_refused(field, value):
    text = Manifest(dataclasses.replace(HEADER, **{field: value}), FILES).to_text()
    with pytest.raises(CheckpointError, match=f'here: {field} is '):
        parse_manifest(text, 'here')


@pytest.mark.parametrize(
    ('size', 'words'),
    [(9, '9 bytes, not 10'), (11, '11 bytes, not 10'), (-1, 'is no regular file'), (None, 'miss')],
)
def test_a_file_of_any_other_size_is_wrong(size, words):
    sizes = {'b.pt': 20, **({} if size is None else {'a.pt': size})}
    (wrong,) = wrong_files(FILES, sizes)
    assert words in wrong
