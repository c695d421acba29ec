"""CHECKPOINT.FROZEN 'once': one file of frozen parameters for all tags, and every reader whole."""

import json
import os
import re
import shutil

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file

from internvl_ds.checkpoint.frozen import frozen_file
from internvl_ds.checkpoint.frozen.frozen_file import FrozenFile
from internvl_ds.checkpoint.frozen.sharing import Sharing
from internvl_ds.checkpoint.sources.open_weights import open_weights
from internvl_ds.checkpoint.tag import commit
from internvl_ds.checkpoint.tag.manifest import FileEntry, Manifest, is_shared, shared_name
from internvl_ds.checkpoint.tag.shared import remove_unneeded
from internvl_ds.checkpoint.tag.trash import MARK
from internvl_ds.checkpoint.tag.verify import damage_of_tag
from internvl_ds.config.choices import frozen_of
from internvl_ds.errors import ConfigError, PretrainedError
from internvl_ds.tools.cli import main
from internvl_ds.tools.text import human_size
from tests.checkpoint.frozen import freezing
from tests.harness.elastic import Net
from tests.harness.model import make_config
from tests.harness.ranks import run_ranks
from tests.harness.tags import make_header


@pytest.mark.ranks
@pytest.mark.first
def test_tags_share_what_is_frozen_and_every_reader_agrees(tmp_path, capsys):
    for found in run_ranks(freezing.share, 2, tmp_path, root=str(tmp_path)):
        for stage, got in found.items():
            first, second, best = got['shared']
            assert first == second == best, stage  # the same inodes
            assert len(first) == (2 if stage == '3' else 1), stage
            changed, different = got['changed']
            assert not changed.keys() & first.keys(), stage
            assert different == [] == got['bare'], stage
            for key in [key for key in got if key.startswith('into')]:
                weights, state, average, losses, wanted = got[key]
                assert (weights, state, average) == ([], True, []), (stage, key)
                # In another layout the gradients are summed in another order.
                same = key == f'into {stage}'
                assert losses == (wanted if same else pytest.approx(wanted, rel=1e-5)), (stage, key)
            assert got.get('timm') in (None, [['frozen.bias'], []])
            if 'plain' in got:
                strict, ours, loose, again = got['plain']
                assert re.search(r'Missing key.*"frozen\.weight"', strict, re.DOTALL), strict
                assert loose == ours == again == [], stage
    for stage in found:
        if stage != '0':
            ask_deepspeeds_converter(tmp_path / stage)
        look_at(tmp_path / stage, capsys)
        harm(tmp_path / stage)


def ask_deepspeeds_converter(output):
    """The script that each save lays beside the tags does not take the trained part for all."""
    with pytest.raises((KeyError, TypeError)):
        get_fp32_state_dict_from_zero_checkpoint(str(output), 'ckpt_epoch_1')
    trained = get_fp32_state_dict_from_zero_checkpoint(
        str(output), 'ckpt_epoch_1', exclude_frozen_parameters=True
    )
    assert not [name for name in trained if 'frozen' in name]


def look_at(output, capsys):
    """What the command and load_pretrained say of three tags of an output directory."""
    first, second, third = (output / f'ckpt_epoch_{n}' for n in range(3))
    assert [damage_of_tag(tag) for tag in (first, second, third)] == [[], [], []]
    assert main(['ckpt', 'verify', str(output), '--all']) == 0
    assert main(['ckpt', 'export', str(second), str(output / 'out.safetensors')]) == 0
    exported = load_file(output / 'out.safetensors')
    source = {name: flat.whole() for name, flat in open_weights(str(second)).items()}
    assert exported.keys() == source.keys() == {*Net().state_dict()}
    assert all(torch.equal(exported[name], tensor) for name, tensor in source.items())
    capsys.readouterr()
    sizes = [p.stat().st_size for p in second.iterdir() if is_shared(p.name)]
    # First, second and best have one file each; best was saved as second was, and links all of it.
    linked = [p.stat() for p in second.iterdir() if not is_shared(p.name)]
    again = 2 * sum(sizes) + sum(s.st_size for s in linked if s.st_nlink > 1)
    assert main(['ckpt', 'list', str(output)]) == 0
    assert f'{human_size(again)} of these sizes are of files' in capsys.readouterr().out
    assert main(['ckpt', 'diff', str(first), str(third), '--json']) == 1
    names = [d['name'] for d in json.loads(capsys.readouterr().out)['found']]
    assert {'model/frozen.weight', 'model/frozen.bias'} <= {*names}
    assert main(['ckpt', 'diff', str(first), str(second), '--json']) == 1
    names = [d['name'] for d in json.loads(capsys.readouterr().out)['found']]
    assert not [name for name in names if 'frozen' in name]


def harm(output):
    """A copy elsewhere is whole; a file that is damaged or missing is named, by all readers."""
    first, second, third = (output / f'ckpt_epoch_{n}' for n in range(3))
    copy = output / 'elsewhere' / 'copied'
    shutil.copytree(second, copy)
    name = next(n for n in sorted(os.listdir(copy)) if is_shared(n))
    assert damage_of_tag(copy) == []
    main(['ckpt', 'prune', str(output), '--keep', '1'])
    assert (first.exists(), second.exists()) == (False, False)
    best = output / 'ckpt_epoch_best'
    assert damage_of_tag(best) == [] == damage_of_tag(third)
    assert (best / name).stat().st_nlink == 1
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    assert [f'{copy / name}: damaged' in text for text in damage_of_tag(copy)] == [True]
    kept = open_weights(str(copy))['stem.bias'].whole().clone()
    (copy / name).unlink()
    told = f'{name} is missing: it holds frozen parameters that this tag shares.*{output}'
    assert re.search(told, damage_of_tag(copy)[0])
    with pytest.raises(PretrainedError, match=told):
        open_weights(str(copy))
    shutil.copy(best / name, copy.parent)  # next to it will do
    assert damage_of_tag(copy) == []
    assert torch.equal(open_weights(str(copy))['stem.bias'].whole(), kept)


@pytest.mark.ranks
def test_by_default_what_is_mostly_frozen_and_large_is_shared_where_there_are_links(tmp_path):
    for found in run_ranks(freezing.choose, 2, tmp_path, root=str(tmp_path)):
        for stage in (1, 3):
            first, second = found[f'probe {stage}']
            assert len(first) == (2 if stage == 3 else 1)
            assert first == second
        for other in ('half', 'small', 'no links', 'keep'):
            assert found[other] == [{}, {}], other
        assert [len(v) for v in found['once']] == [1, 1]


@pytest.mark.ranks
def test_without_hard_links_the_file_lies_next_to_the_tags_and_goes_with_the_last(tmp_path):
    for found in run_ranks(freezing.without_links, 2, tmp_path, root=str(tmp_path)):
        for stage, got in found.items():
            assert got['inside'] == [{}], stage
            before, after = got['after']
            assert len(before) == len(after) == (2 if stage == '3' else 1), stage
            assert not {*before} & {*after}, stage  # SAVE_CKPT_NUM is 1
            assert (got['same'], got['gone'], got['bare'], got['third']) == (True, True, [], [])


@pytest.mark.ranks
def test_a_load_names_what_is_missing_on_all_ranks_and_changes_nothing(tmp_path):
    run_ranks(freezing.save_one, 2, tmp_path, root=str(tmp_path))
    tag = tmp_path / 'run' / 'ckpt_epoch_0'
    second = next(n for n in os.listdir(tag) if n.startswith('frozen_rank_1'))
    content = (tag / second).read_bytes()
    (tag / second).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = run_ranks(freezing.fail, 2, tmp_path, root=str(tmp_path), tag=str(tag))[0]
    assert [bool(re.search(f'{second}: damaged', text)) for text in said] == [True, True, False]
    assert said[2] == '[]'  # the weights are as they were
    (tag / second).unlink()
    said = run_ranks(freezing.fail, 2, tmp_path, root=str(tmp_path), tag=str(tag))[0]
    told = f'{second} is missing: it holds frozen parameters'
    assert [told in text for text in said] == [True, True, False]
    assert said[2] == '[]'


def staged(output, number, value=1.0, seen=None):
    """A tag of one model file, made as a save makes it, and the shared file's place in it."""
    tag = output / f'ckpt_epoch_{number}'
    tag.mkdir(parents=True)
    (tag / MARK).touch()
    apart = Sharing(
        output, tag, frozenset('w'), {}, sharded=False, seen=set() if seen is None else seen
    )
    state = {'module': {'w': torch.full((64,), value), 'x': torch.zeros(4)}}
    for path, content in apart.parts(state, tag / 'mp_rank_00_model_states.pt'):
        if isinstance(content, FrozenFile):
            frozen_file.write(content, path)
    (name,) = apart.files
    return tag / name


def test_the_next_tag_has_the_same_file_and_another_value_another_one(tmp_path):
    first, second, other = staged(tmp_path, 0), staged(tmp_path, 1), staged(tmp_path, 2, 2.0)
    assert first.samefile(second)
    assert other.name != first.name
    first.unlink()
    assert staged(tmp_path, 3).samefile(second)


def test_a_damaged_file_is_not_shared_on(tmp_path, caplog):
    first = staged(tmp_path, 0)
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    second = staged(tmp_path, 1)
    assert f'{first}: damaged; the frozen parameters are written anew' in caplog.text
    assert second.read_bytes() == content
    assert staged(tmp_path, 2).samefile(second)


def test_a_file_that_was_compared_is_compared_again_when_it_was_written_since(tmp_path, caplog):
    seen = set()
    first = staged(tmp_path, 0, seen=seen)
    assert staged(tmp_path, 1, seen=seen).samefile(first)
    content = first.read_bytes()
    first.write_bytes(bytes(len(content)))
    assert staged(tmp_path, 2, seen=seen).read_bytes() == content
    assert 'damaged' in caplog.text


def test_a_file_next_to_the_tags_stays_while_a_save_is_under_way_or_a_tag_needs_it(tmp_path):
    name = shared_name(0, 'a' * 32)
    (tmp_path / name).touch()
    staging = commit.begin(tmp_path, 'ckpt_epoch_0')  # which removes it: nobody needs it
    assert not (tmp_path / name).exists()
    (tmp_path / name).touch()
    assert remove_unneeded(tmp_path) == []
    commit.commit(staging, Manifest(make_header('ckpt_epoch_0', 0), {name: FileEntry(0, 'a' * 32)}))
    assert remove_unneeded(tmp_path) == []
    (tmp_path / 'ckpt_epoch_1').mkdir()
    (tmp_path / 'ckpt_epoch_1' / 'manifest.json').write_text('{')  # it may need it
    shutil.rmtree(tmp_path / 'ckpt_epoch_0')
    assert remove_unneeded(tmp_path) == []
    shutil.rmtree(tmp_path / 'ckpt_epoch_1')
    assert remove_unneeded(tmp_path) == [name]


@pytest.mark.parametrize('value', ['once ', 'none', True])
def test_another_word_is_refused_before_training(value):
    words = "CHECKPOINT.FROZEN is .*; it can be 'auto', 'keep', 'once', 'omit'"
    with pytest.raises(ConfigError, match=words):
        frozen_of(make_config(CHECKPOINT__FROZEN=value))
