"""Shards read as parameters by name: tags written by hand, in DeepSpeed's layout. No processes."""

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from internvl_ds.checkpoint.formats.shard_files import read_shard
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.tag.hashing import hash_file
from internvl_ds.checkpoint.tag.manifest import Identity, Manifest
from internvl_ds.errors import CheckpointError, CheckpointMismatch
from tests.harness.tags import make_header

A = torch.arange(15.0).reshape(3, 5)  # 15 elements: 8 a rank and one of padding at stage 3
B = torch.arange(100.0, 107.0)
FROZEN = torch.arange(200.0, 203.0)


def _head(stage, module, ranks=2, **more):
    return {
        'module': module,
        'buffer_names': ['steps'],
        'dp_world_size': ranks,
        'global_steps': 4,
        'ds_config': {'zero_optimization': {'stage': stage}},
        'param_shapes': [OrderedDict(a=A.shape), OrderedDict(b=B.shape)],
        'shared_params': {'tied': 'a'},
        'optimizer': None,
        **more,
    }


def _slices(tensor, ranks=2):
    flat = tensor.flatten()
    length = -(-flat.numel() // ranks)
    padded = torch.cat([flat, torch.full((length * ranks - flat.numel(),), -1.0)])
    return list(padded.split(length))


def _stage_3(tag: Path):
    empty = {'a': torch.empty(0), 'b': torch.empty(0), 'steps': torch.tensor(9)}
    for rank in range(2):
        head = _head(
            3, empty,
            frozen_param_shapes=OrderedDict(frozen=FROZEN.shape),
            frozen_param_fragments=OrderedDict(frozen=_slices(FROZEN)[rank]),
        )  # fmt: skip
        torch.save(head, tag / f'zero_pp_rank_{rank}_mp_rank_00_model_states.pt')
        groups = [_slices(A)[rank], _slices(B)[rank]]
        torch.save(
            {'optimizer_state_dict': {'zero_stage': 3, 'fp32_flat_groups': groups}},
            tag / f'bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt',
        )


def test_slices_of_stage_3_are_put_together(tmp_path):
    _stage_3(tmp_path)
    shards = TagShards(tmp_path)
    weights = shards.weights()
    expected = {'a': A, 'b': B, 'frozen': FROZEN, 'steps': torch.tensor(9), 'tied': A}
    assert weights.keys() == expected.keys() == shards.shapes().keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
        assert shards.shapes()[name] == tuple(value.shape)
    assert (shards.zero_stage, shards.world_size, shards.global_steps) == (3, 2, 4)
    assert shards.groups() == [['a'], ['b']]


def test_runs_of_stages_1_and_2_are_put_together_with_their_gaps(tmp_path):
    torch.save(_head(2, {}), tmp_path / 'mp_rank_00_model_states.pt')
    gap = torch.full((3,), -1.0)
    halves = [torch.cat([A.flatten(), gap]).split(9), (B[:4], B[4:])]
    for rank in range(2):
        state = {
            'single_partition_of_fp32_groups': [group[rank] for group in halves],
            'group_paddings': [0, rank],
            'param_alignment_paddings': [[3], [0]],
            'base_optimizer_state': {
                'state': {
                    0: {'step': torch.tensor(4.0), 'exp_avg': -halves[0][rank]},
                    1: {'step': torch.tensor(4.0), 'exp_avg': -halves[1][rank]},
                },
                'param_groups': [{'params': [0], 'lr': 0.1}, {'params': [1], 'lr': 0.2}],
            },
        }
        torch.save(
            {'optimizer_state_dict': state},
            tmp_path / f'zero_pp_rank_{rank}_mp_rank_00_optim_states.pt',
        )
    shards = TagShards(tmp_path)
    state = shards.named_state()
    for name, whole in (('a', A), ('b', B)):
        assert torch.equal(state.masters[name].whole(), whole)
        assert torch.equal(state.moments[name]['exp_avg'].whole(), -whole)
        assert state.steps[name] == {'step': 4.0}
    assert [group['lr'] for group in shards.settings()] == [0.1, 0.2]
    # an end that a rank's cut goes through, without the rest
    target = torch.empty(3)
    state.masters['a'].copy_to(target, 7)
    assert target.tolist() == A.flatten()[7:10].tolist()
    # state that is no flat partition cannot be cut anew
    path = tmp_path / 'zero_pp_rank_0_mp_rank_00_optim_states.pt'
    shard = torch.load(path)
    inner = shard['optimizer_state_dict']['base_optimizer_state']['state']
    inner[0]['rows'] = torch.ones(2)
    torch.save(shard, path)
    state = TagShards(tmp_path).named_state()
    assert torch.equal(state.masters['a'].whole(), A)
    with pytest.raises(
        CheckpointMismatch, match='rows of group 0 .* only in the layout that it was'
    ):
        state.require_all_named()


def test_gaps_between_the_parameters_of_a_group_are_left_out(tmp_path):
    shapes = [OrderedDict(a=A.shape, b=B.shape)]
    head = _head(1, {}, ranks=1, param_shapes=shapes, skipped_steps=1)
    torch.save(head, tmp_path / 'mp_rank_00_model_states.pt')
    masters = torch.cat([A.flatten(), torch.full((1,), -1.0), B])
    state = {
        'single_partition_of_fp32_groups': [masters], 'group_paddings': [0],
        'param_alignment_paddings': [[1, 0]],
        'base_optimizer_state': {'state': {}, 'param_groups': [{'params': [0]}]},
    }  # fmt: skip
    path = tmp_path / 'zero_pp_rank_0_mp_rank_00_optim_states.pt'
    torch.save({'optimizer_state_dict': state}, path)
    shards = TagShards(tmp_path)
    named = shards.named_state().masters
    assert torch.equal(named['a'].whole(), A)
    assert torch.equal(named['b'].whole(), B)
    assert (shards.global_steps, shards.updates, shards.fresh) == (4, 3, False)


def test_a_file_without_what_all_have_or_of_another_rank_is_refused(tmp_path):
    model = tmp_path / 'mp_rank_00_model_states.pt'
    torch.save({'module': {}}, model)
    said = 'not the model states of DeepSpeed: has no dp_world_size, global_steps'
    with pytest.raises(CheckpointError, match=said):
        _ = TagShards(tmp_path).head
    torch.save([1], model)
    with pytest.raises(CheckpointError, match='nor its optimizer states'):
        TagShards(tmp_path).read(model)
    header = make_header('ckpt_epoch_0', 0, save='5e6f')
    whose = Identity('ckpt_epoch_0', '5e6f', 1).to_dict()
    torch.save({Identity.KEY: whose, **_head(0, {}, ranks=1)}, model)
    manifest = Manifest(header, {model.name: hash_file(model)})
    (tmp_path / 'manifest.json').write_text(manifest.to_text())
    with pytest.raises(CheckpointError, match="holds rank 1's file of save 5e6f"):
        _ = TagShards(tmp_path).head


def test_ten_ranks_are_taken_in_the_order_of_their_numbers(tmp_path):
    for rank in range(11):
        (tmp_path / f'zero_pp_rank_{rank}_mp_rank_00_model_states.pt').touch()
    names = [path.name for path in TagShards(tmp_path).model_files]
    assert names == [f'zero_pp_rank_{r}_mp_rank_00_model_states.pt' for r in range(11)]


def test_a_missing_shard_is_counted(tmp_path):
    _stage_3(tmp_path)
    (tmp_path / 'bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt').unlink()
    with pytest.raises(CheckpointError, match='saved by 2 ranks, but it has 1'):
        TagShards(tmp_path).weights()


def test_sizes_that_do_not_add_up_are_an_error(tmp_path):
    _stage_3(tmp_path)
    path = tmp_path / 'bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt'
    state = torch.load(path)
    state['optimizer_state_dict']['fp32_flat_groups'][1] = torch.zeros(2)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match='the shard has 2'):
        TagShards(tmp_path).weights()


def test_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match='it is no DeepSpeed checkpoint'):
        TagShards(tmp_path)
    torch.save([1], tmp_path / 'mp_rank_00_model_states.pt')
    with pytest.raises(CheckpointError, match='not the model states of DeepSpeed'):
        _ = TagShards(tmp_path).zero_stage
    (tmp_path / 'cut.pt').write_bytes((tmp_path / 'mp_rank_00_model_states.pt').read_bytes()[:99])
    with pytest.raises(CheckpointError, match=r'cut\.pt: '):
        read_shard(tmp_path / 'cut.pt')


class _Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def test_a_payload_is_refused_and_not_run(tmp_path):
    torch.save({'module': {}, 'x': _Payload(str(tmp_path / 'owned'))}, tmp_path / 'shard.pt')
    for mmap in (False, True):
        with pytest.raises(CheckpointError, match='refused, because it holds more than tensors'):
            read_shard(tmp_path / 'shard.pt', mmap=mmap)
    assert not (tmp_path / 'owned').exists()


def test_a_whole_state_of_stage_0_is_named_by_its_groups_or_by_the_running_ones(tmp_path):
    low = A.bfloat16()
    optimizer = {
        'optimizer_state_dict': {
            'state': {
                0: {'step': torch.tensor(2.0), 'exp_avg': -B},
                1: {'step': torch.tensor(2.0), 'exp_avg': -A},
            },
            'param_groups': [{'params': [0]}, {'params': [1]}],
        },
        'fp32_groups': [[B], [A]],
    }
    module = OrderedDict(a=low, tied=low, b=B.bfloat16(), frozen=FROZEN, none=torch.empty(0))
    head = _head(0, module, shared_params=None, optimizer=optimizer)
    torch.save(head, tmp_path / 'mp_rank_00_model_states.pt')
    shards = TagShards(tmp_path)
    state = shards.named_state([['b'], ['a']])  # the file does not name them
    assert shards.aliases() == {'tied': 'a'}
    weights = state.weights()
    assert weights.keys() == module.keys()
    assert torch.equal(weights['tied'].whole(), A)  # the master, not its rounding
    assert torch.equal(weights['none'].whole(), torch.empty(0))
    assert torch.equal(state.moments['b']['exp_avg'].whole(), -B)
    assert state.steps == {'a': {'step': 2.0}, 'b': {'step': 2.0}}
    assert state.fixed.keys() == {'frozen', 'none'}
    with pytest.raises(CheckpointMismatch, match='has 2 parameter groups with 1, 1 tensors'):
        shards.named_state([['a', 'b']])
    with pytest.raises(CheckpointMismatch, match='the master of parameter 0 has shape'):
        shards.named_state([['a'], ['b']])


def test_several_threads_read_at_a_time(tmp_path):
    """torch's list of allowed classes is the process's: who leaves takes his away from all."""
    path = tmp_path / 'shard.pt'
    torch.save({'scaler': [LossScaler(1.0)] * 50, 'stage': ZeroStageEnum.weights}, path)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(read_shard, [path] * 200):
            assert found['stage'] is ZeroStageEnum.weights
