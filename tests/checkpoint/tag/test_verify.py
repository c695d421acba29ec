"""Contents compared with what was written: a real tag, damaged for real."""

import shutil

import pytest
import torch

from internvl_ds.checkpoint.formats.ema_files import with_identity
from internvl_ds.checkpoint.formats.state_json import state_text
from internvl_ds.checkpoint.tag import commit
from internvl_ds.checkpoint.tag.discovery import problem, read_manifest
from internvl_ds.checkpoint.tag.hashing import write_hashed
from internvl_ds.checkpoint.tag.manifest import FileEntry, Identity, Manifest
from internvl_ds.checkpoint.tag.verify import (
    Seen,
    damage,
    damage_of_tag,
    ema_files_of_rank,
    share_of,
    training_files,
    weight_files,
)
from internvl_ds.errors import CheckpointError
from tests.harness.tags import make_header, save_safetensors, save_tensors

NAMES = ('zero_pp_rank_0_mp_rank_00_optim_states.pt', 'zero_pp_rank_1_mp_rank_00_optim_states.pt')
SIZE = (1 << 20) + 100


def _save(output, epoch):
    """A tag of two files, whose contents no other tag has."""
    staging = commit.begin(output, f'ckpt_epoch_{epoch}')
    files = {}
    for number, name in enumerate(NAMES, 10 * epoch):
        content = bytes([number]) * SIZE
        files[name] = write_hashed(staging.path / name, lambda file: file.write(content))
    return commit.commit(staging, Manifest(make_header(staging.tag, epoch), files))


@pytest.fixture
def tag(tmp_path):
    return _save(tmp_path, 1)


def test_an_untouched_tag_has_no_damage(tag):
    assert damage_of_tag(tag) == []


@pytest.mark.parametrize('at', [0, SIZE // 2, SIZE - 1])
def test_one_flipped_bit_is_found_and_the_file_named(tag, at):
    path = tag / NAMES[1]
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    (found,) = damage_of_tag(tag)
    entry = read_manifest(tag).files[NAMES[1]]
    assert found.startswith(f'{path}: damaged: its xxh3-128 is ')
    assert f'{entry.digest} was written' in found
    assert problem(tag) is None  # sizes alone do not tell


def test_a_truncated_file_is_named_with_both_sizes(tag):
    path = tag / NAMES[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert damage_of_tag(tag) == [f'{path}: has {SIZE - 1} bytes, not {SIZE}']


def test_a_missing_file_is_named(tag):
    (tag / NAMES[0]).unlink()
    (found,) = damage_of_tag(tag)
    assert found == f'{tag / NAMES[0]}: cannot be read: No such file or directory'


def test_a_file_of_another_tag_of_the_same_size_is_found(tag, tmp_path):
    shutil.copyfile(_save(tmp_path, 2) / NAMES[0], tag / NAMES[0])
    (found,) = damage_of_tag(tag)
    assert found.startswith(f'{tag / NAMES[0]}: damaged')


def test_two_files_that_changed_places_are_both_found(tag):
    (tag / NAMES[0]).rename(tag / 'x')
    (tag / NAMES[1]).rename(tag / NAMES[0])
    (tag / 'x').rename(tag / NAMES[1])
    assert [text.partition(': ')[0] for text in damage_of_tag(tag)] == [
        str(tag / name) for name in NAMES
    ]


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tag):
    (tag / NAMES[0]).unlink()
    (tag / NAMES[0]).mkdir()  # whoever runs this may read any file, but not a directory
    (found,) = damage_of_tag(tag)
    assert found == f'{tag / NAMES[0]}: cannot be read: Is a directory'


def test_only_the_named_files_are_read(tag):
    (tag / NAMES[0]).unlink()
    assert damage(tag, read_manifest(tag), [NAMES[1]]) == []


def test_a_file_that_the_manifest_does_not_list_is_damage(tag):
    (tag / 'state.json').write_text('{}')
    found = damage(tag, read_manifest(tag), ['state.json'])
    assert found == [f'{tag / "state.json"}: not a file of this checkpoint']


def test_nothing_can_be_said_of_a_tag_without_a_manifest(tmp_path):
    plain = tmp_path / 'global_step100'
    plain.mkdir()
    (plain / 'mp_rank_00_model_states.pt').write_bytes(b'x')
    assert damage_of_tag(plain) is None


def test_a_damaged_manifest_is_an_error(tag):
    path = tag / 'manifest.json'
    path.write_text(path.read_text().replace('"epoch": 1', '"epoch": 2'))
    with pytest.raises(CheckpointError, match=f'{path}: damaged'):
        damage_of_tag(tag)


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_the_ranks_share_the_files_so_that_each_is_read_once(world_size):
    names = [*NAMES, 'ema_rank_2.safetensors', 'mp_rank_00_model_states.pt', 'state.json']
    shares = [share_of(names, rank, world_size) for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    if world_size > 1:
        assert NAMES[1] in shares[1]  # its own


MODELS = ('zero_pp_rank_0_mp_rank_00_model_states.pt', 'zero_pp_rank_1_mp_rank_00_model_states.pt')
EMA = ('ema_rank_0.safetensors', 'ema_rank_1.safetensors', 'ema_rank_2.safetensors')


def manifest_of(stage, *names):
    files = {name: FileEntry(1, 'a' * 32) for name in names}
    return Manifest(make_header('ckpt_epoch_0', 0, zero_stage=stage), files)


def test_the_weights_of_stage_3_are_in_all_ranks_files():
    assert weight_files(manifest_of(1, MODELS[0], NAMES[0])) == ['state.json', MODELS[0]]
    assert weight_files(manifest_of(3, MODELS[0], NAMES[0])) == ['state.json', MODELS[0], NAMES[0]]


def test_each_rank_verifies_what_it_goes_on_from():
    whole = 'mp_rank_00_model_states.pt'
    loops = ('loop_rank_0.json', 'loop_rank_1.json')
    manifest = manifest_of(1, whole, *NAMES, *loops, *EMA)
    assert training_files(manifest) == ['state.json', whole, *NAMES, *loops]
    assert training_files(manifest, 1) == ['state.json', whole, NAMES[1], loops[1]]
    assert ema_files_of_rank(manifest, 1) == ['state.json', EMA[0], EMA[1]]


def test_ranks_of_a_host_compare_what_all_of_them_read_once():
    whole = 'mp_rank_00_model_states.pt'
    manifest = manifest_of(1, whole, *NAMES, *EMA)
    assert training_files(manifest, 0, [0, 1]) == ['state.json', whole, NAMES[0]]
    assert training_files(manifest, 1, [0, 1]) == [NAMES[1]]
    assert training_files(manifest, 1, [1]) == ['state.json', whole, NAMES[1]]  # another host
    assert ema_files_of_rank(manifest, 0, [0, 1]) == ['state.json', EMA[0]]
    assert ema_files_of_rank(manifest, 1, [0, 1]) == [EMA[1]]
    assert ema_files_of_rank(manifest, 1, [1, 2]) == ['state.json', EMA[0], EMA[1]]
    assert ema_files_of_rank(manifest, 2, [1, 2]) == [EMA[2]]


def test_a_file_that_was_compared_counts_once_and_only_as_it_was(tmp_path):
    names = ['a', 'b', 'c', 'd']
    for name in names:
        (tmp_path / name).write_bytes(b'x' * 9)
    seen = Seen()
    seen.look(tmp_path, names[:3])
    with (tmp_path / 'b').open('r+b') as file:
        file.write(b'y')
    (tmp_path / 'c').unlink()
    assert [seen.take(tmp_path, name) for name in names] == [True, False, False, False]
    assert not seen.take(tmp_path, 'a')
    seen.look(tmp_path, ['d'])
    seen.forget()
    assert not seen.take(tmp_path, 'd')


@pytest.mark.parametrize('kind', ['json', 'safetensors', 'pt'])
def test_a_whole_file_of_another_save_is_damage(tmp_path, kind):
    def identity(save):
        return Identity('ckpt_epoch_0', save, 0)

    def write(path, save):
        if kind == 'json':
            text = state_text({Identity.KEY: identity(save).to_dict()}).encode()
            return write_hashed(path, lambda file: file.write(text))
        if kind == 'safetensors':
            return save_safetensors({'x': torch.ones(1)}, path, with_identity(None, identity(save)))
        return save_tensors({Identity.KEY: identity(save).to_dict()}, path)

    names = {'json': 'state.json', 'safetensors': EMA[0], 'pt': 'mp_rank_00_model_states.pt'}
    path = tmp_path / names[kind]
    for save, damaged in (('5e6f', False), ('other', True)):
        manifest = Manifest(
            make_header('ckpt_epoch_0', 0, save='5e6f'), {path.name: write(path, save)}
        )
        found = damage(tmp_path, manifest, manifest.files)
        assert bool(found) == damaged
        assert not damaged or "rank 0's file of save other" in found[0]
