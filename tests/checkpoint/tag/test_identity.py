"""Only a tag's own files are read: not what lies beside them, nor another rank's or save's."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from internvl_ds import load_checkpoint, load_pretrained
from internvl_ds.checkpoint.formats.ema_files import EmaFiles
from internvl_ds.checkpoint.formats.ema_tensors import read_whole_ema
from internvl_ds.checkpoint.formats.state_json import state_of
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.tag.discovery import read_manifest
from internvl_ds.checkpoint.tag.hashing import hash_file
from internvl_ds.checkpoint.tag.identity import model_names, optim_names, require_identity
from internvl_ds.checkpoint.tag.manifest import FILE_NAME, Header, Identity, Manifest
from internvl_ds.checkpoint.tag.verify import damage_of_tag
from internvl_ds.errors import CheckpointError, PretrainedError
from tests.checkpoint import proving
from tests.harness.elastic import Net
from tests.harness.model import make_config
from tests.harness.ranks import run_ranks
from tests.harness.tags import make_header

logger = logging.getLogger('test')
MODEL, MODEL_3 = 'mp_rank_00_model_states.pt', 'zero_pp_rank_{}_mp_rank_00_model_states.pt'
OPTIM = 'zero_pp_rank_{}_mp_rank_00_optim_states.pt'


def never(name):
    raise AssertionError(f'{name} was asked for')


def test_names_that_deepspeed_does_not_give_are_nobodys():
    names = ['old_' + MODEL, MODEL, MODEL + '.bak_model_states.pt', OPTIM.format(0), 'x_optim.pt']
    assert model_names(Path('t'), names, never) == [MODEL]
    assert optim_names([*names, OPTIM.format(2), 'bf16_' + OPTIM.format(0)], 2, bf16=False) == [
        OPTIM.format(0)
    ]
    assert optim_names(['bf16_' + OPTIM.format(0), OPTIM.format(0)], 1, bf16=True) == [
        'bf16_' + OPTIM.format(0)
    ]


def test_of_two_tags_in_one_directory_the_optimizers_files_decide():
    names = [MODEL, MODEL_3.format(1), MODEL_3.format(0), OPTIM.format(0), OPTIM.format(1)]
    assert model_names(Path('t'), names, lambda name: 3) == [MODEL_3.format(0), MODEL_3.format(1)]
    assert model_names(Path('t'), names, lambda name: 1) == [MODEL]


def test_a_tag_of_model_parallel_ranks_is_refused():
    with pytest.raises(CheckpointError, match='mp_rank_01_model_states.pt: of model-parallel'):
        model_names(Path('t'), [MODEL, 'mp_rank_01_model_states.pt'], never)


def test_a_file_of_another_save_is_named():
    header = make_header('ckpt_epoch_1', 1, save='abc')
    own = Identity('ckpt_epoch_1', 'abc', 1).to_dict()
    path = Path('t') / OPTIM.format(1)
    require_identity(path, own, header)
    require_identity(path, None, make_header('ckpt_epoch_1', 1))  # of an earlier version
    for other in ({**own, 'rank': '0'}, {**own, 'save': 'x'}, {**own, 'tag': 'y'}, None, 7):
        with pytest.raises(CheckpointError, match="rank 1's file of save abc of ckpt_epoch_1 bel"):
            require_identity(path, other, header)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp('tags')
    return run_ranks(proving.save_tags, 2, root, root=root)[0]


def copy_of(tag, tmp_path):
    return Path(shutil.copytree(tag, tmp_path / Path(tag).name))


def sign(tag):
    """Makes the manifest's checksums anew, as someone would who moves files by hand."""
    manifest = read_manifest(tag)
    files = {name: hash_file(tag / name) for name in manifest.files}
    header = Header(**{**vars(manifest.header), 'size': sum(e.size for e in files.values())})
    (tag / FILE_NAME).write_text(Manifest(header, files).to_text())


def evaluated(tag):
    """The weights that EVAL_MODE and load_pretrained find in a tag, which have to be the same."""
    models = [Net(), Net()]
    config = make_config(EVAL_MODE=True, MODEL__RESUME=str(tag), MODEL__PRETRAINED=str(tag))
    load_checkpoint(config, models[0], None, None, None, logger)
    load_pretrained(config, models[1], logger)
    first, second = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    return {name: tensor.tolist() for name, tensor in first.items()}


def poisoned(path, target):
    """A copy of a shard whose weights are all 7."""
    content = torch.load(path, weights_only=False)
    content['module'] = {n: torch.full_like(t, 7) for n, t in content['module'].items()}
    torch.save(content, target)


@pytest.mark.first
@pytest.mark.ranks
def test_what_lies_beside_a_tags_files_is_not_read(saved, tmp_path):
    first, third = saved['1'], saved['3']
    tag = copy_of(first['tags'][1], tmp_path)
    for name in ('old_' + MODEL, 'mp_rank_01_model_states.pt', MODEL_3.format(0), 'mp_rank_0_b'):
        poisoned(tag / MODEL, tag / name.replace('0_b', '00_model_states (copy)_model_states.pt'))
    shutil.copy(tag / OPTIM.format(0), tag / OPTIM.format(2))
    shutil.copy(tag / OPTIM.format(0), tag / ('bf16_' + OPTIM.format(0)))
    average = read_whole_ema(EmaFiles(Path(first['tags'][1])))
    save_file({n: torch.full_like(t, 7) for n, t in average.items()}, tag / 'ema.safetensors')
    shutil.copy(tag / 'ema_rank_0.safetensors', tag / 'ema_rank_2.safetensors')
    assert evaluated(tag) == first['weights']
    found = read_whole_ema(EmaFiles(tag))
    assert all(torch.equal(found[name], average[name]) for name in average)

    over = copy_of(third['tags'][1], tmp_path / 'over')  # a stage-1 tag copied over a stage-3 tag
    shutil.copytree(first['tags'][1], over, dirs_exist_ok=True)
    assert evaluated(over) == first['weights']
    back = copy_of(first['tags'][1], tmp_path / 'back')
    shutil.copytree(third['tags'][1], back, dirs_exist_ok=True)
    assert evaluated(back) == third['weights']

    loads = [[tag, 1], [tag, 3], [over, 1], [over, 2], [back, 3], [back, 1]]
    wanted = [first, first, first, first, third, third]
    for results in run_ranks(proving.load_tags, 2, tmp_path, loads=loads):
        for (path, stage), got, want in zip(loads, results, wanted, strict=True):
            assert got.get('weights') == want['weights'], (path, stage, got)
            assert got['updates'] == 2, (path, stage)


@pytest.mark.ranks
def test_of_a_plain_tag_deepspeeds_own_names_are_read_and_the_rest_is_warned_of(saved, tmp_path):
    first, third = saved['1'], saved['3']
    tag = copy_of(first['plain'], tmp_path)
    poisoned(tag / MODEL, tag / ('old_' + MODEL))
    poisoned(tag / MODEL, tag / 'mp_rank_00_model_states (copy)_model_states.pt')
    shutil.copy(tag / OPTIM.format(0), tag / OPTIM.format(2))
    over = copy_of(third['plain'], tmp_path / 'over')
    shutil.copytree(first['plain'], over, dirs_exist_ok=True)
    back = copy_of(first['plain'], tmp_path / 'back')
    shutil.copytree(third['plain'], back, dirs_exist_ok=True)
    loads = [[tag, 1], [tag, 2], [over, 1], [over, 3], [back, 3], [back, 1]]
    wanted = [first, first, first, first, third, third]
    for results in run_ranks(proving.load_tags, 2, tmp_path, loads=loads):
        for (path, stage), got, want in zip(loads, results, wanted, strict=True):
            assert got.get('weights') == want['weights'], (path, stage, got)
            assert any('files that are not of its layout' in text for text in got['said']), path
    assert evaluated(tag) == evaluated(over) == first['weights']
    assert evaluated(back) == third['weights']


def swap(one, other):
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


@pytest.mark.ranks
def test_files_of_another_rank_or_save_are_named_whatever_their_checksums(saved, tmp_path):
    loads, names = [], []
    for stage in ('1', '3'):
        newer, older = map(Path, reversed(saved[stage]['tags']))
        tags = [copy_of(newer, tmp_path / f'{stage}-{number}') for number in range(6)]
        swap(tags[0] / OPTIM.format(0), tags[0] / OPTIM.format(1))
        shutil.copy(older / OPTIM.format(1), tags[1])
        model = MODEL if stage == '1' else MODEL_3.format(1)
        shutil.copy(older / model, tags[2])
        shutil.copy(older / 'state.json', tags[3])
        swap(tags[4] / 'loop_rank_0.json', tags[4] / 'loop_rank_1.json')
        swap(tags[5] / 'ema_rank_0.safetensors', tags[5] / 'ema_rank_1.safetensors')
        # the other rank of a swapped pair names its own file
        optim = 'mp_rank_00_optim_states.pt'
        names += [optim, OPTIM.format(1), model, 'state.json', 'loop_rank_', 'ema_rank_']
        for tag in tags:
            sign(tag)
            loads.append([tag, int(stage)])
            assert 'belongs here' in '; '.join(damage_of_tag(tag))
        assert damage_of_tag(newer) == []
        with pytest.raises(CheckpointError, match='save'):
            state_of(tags[3])
        with pytest.raises(CheckpointError, match='belongs here'):
            read_whole_ema(EmaFiles(tags[5]))
        config = make_config(MODEL__PRETRAINED=str(tags[2]))
        with pytest.raises((PretrainedError, CheckpointError), match='belongs here'):
            load_pretrained(config, Net(), logger)
    for results in run_ranks(proving.load_tags, 2, tmp_path, loads=loads):
        for (path, _), name, got in zip(loads, names, results, strict=True):
            assert 'error' in got, path
            assert name in got['error'], (path, got)
            assert 'belongs here' in got['error'], (path, got)


@pytest.mark.ranks
def test_every_file_of_a_tag_says_whose_it_is(saved):
    for stage in ('1', '3'):
        tag = Path(saved[stage]['tags'][0])
        manifest = read_manifest(tag)
        shards = TagShards(tag)
        for path in (*shards.model_files, *shards.optim_files):
            assert shards.read(path)[Identity.KEY]['save'] == manifest.header.save
        for name in ('state.json', 'loop_rank_1.json'):
            said = json.loads((tag / name).read_text())[Identity.KEY]
            assert said['save'] == manifest.header.save
        assert manifest.header.save
