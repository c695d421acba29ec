"""CHECKPOINT.FROZEN 'once': one file of frozen parameters for all tags, and every reader whole."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from internvl_ds.checkpoint.sources.open_weights import open_weights
from internvl_ds.checkpoint.tag.manifest import is_shared
from internvl_ds.checkpoint.tag.verify import damage_of_tag
from internvl_ds.errors import PretrainedError
from internvl_ds.tools.cli import main
from internvl_ds.tools.text import human_size
from tests.checkpoint.frozen import freezing
from tests.harness.elastic import Net
from tests.harness.ranks import run_ranks


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
        look_at(tmp_path / stage, capsys)
        harm(tmp_path / stage)


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
    assert main(['ckpt', 'list', str(output)]) == 0  # first, second and best have one file each
    assert f'{human_size(2 * sum(sizes))} of these sizes are frozen' in capsys.readouterr().out
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
