"""A save proves itself: nothing is published that a load would refuse, and nothing is left out."""

import io
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from internvl_ds.checkpoint.formats.allowed import PortablePickle
from internvl_ds.checkpoint.formats.outline import _KNOWN, outline
from internvl_ds.checkpoint.formats.shard_files import read_shard
from internvl_ds.checkpoint.proof import Wanted, prove
from internvl_ds.errors import CheckpointError
from internvl_ds.zero.partition import Runs, Slices
from tests.checkpoint import proving
from tests.harness.model import OLD_DEEPSPEED
from tests.harness.ranks import run_ranks

STAGES = [0, 1, 2, 3]


def write(path, value):
    torch.save(value, path, pickle_module=PortablePickle)
    return path


SHAPES = {'a': (2, 3), 'b': (4,), 'seen': ()}
MODEL, OPTIM = 'mp_rank_00_model_states.pt', 'zero_pp_rank_0_mp_rank_00_optim_states.pt'


def written(folder, stage, harm):
    """A rank's files of a save at a stage, which ``harm`` may change first; their names."""
    head = {
        'module': {name: torch.ones(shape) for name, shape in SHAPES.items()},
        'buffer_names': ['seen'],
        'dp_world_size': 1,
        'global_steps': 4,
        'ds_config': {'zero_optimization': {'stage': stage}},
        'param_shapes': [OrderedDict(a=torch.Size((2, 3)), b=torch.Size((4,)))] if stage else None,
        'shared_params': {},
        'frozen_param_shapes': OrderedDict(frozen=torch.Size((5,))) if stage == 3 else None,
        'frozen_param_fragments': OrderedDict(frozen=torch.ones(5)) if stage == 3 else None,
        'optimizer': None if stage else {'param_groups': [{'params': [0, 1]}], 'state': {}},
    }
    masters = 'fp32_flat_groups' if stage == 3 else 'single_partition_of_fp32_groups'
    optim = {'optimizer_state_dict': {'zero_stage': stage, masters: [torch.ones(10)]}}
    texts = {'loop_rank_0.json': '{}\n'}
    harm(head, optim['optimizer_state_dict'], texts)
    model = f'zero_pp_rank_0_{MODEL}' if stage == 3 else MODEL
    write(folder / model, head)
    write(folder / OPTIM, optim)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [model, *([OPTIM] if stage else []), *texts]


def wanted(stage):
    shapes = {**SHAPES, **({'frozen': (5,)} if stage == 3 else {})}
    group = {'a': (2, 3), 'b': (4,)}
    layouts = {0: None, 1: Runs([group], None, [10], 1), 3: Slices([group], 1)}
    return Wanted(shapes, frozenset(group), [list(group)], layouts[stage], 0)


@pytest.mark.parametrize('stage', [0, 1, 3])
def test_files_that_hold_all_are_accepted(tmp_path, stage):
    prove(tmp_path, written(tmp_path, stage, lambda *_: None), wanted(stage))


HARMS = {
    'a tensor of the module is not in it': (
        1, lambda head, *_: head['module'].pop('seen'), '1 tensors of the module are not in it: s'
    ),
    'a tensor has another shape': (
        1, lambda head, *_: head['module'].update(b=torch.ones(5)), r'b \(5,\) in place of \(4,\)'
    ),
    'a parameter is in two groups': (
        1, lambda head, *_: head['param_shapes'].append(OrderedDict(a=torch.Size((2, 3)))),
        r'twice \(a\)',
    ),
    'a trained parameter is in no group': (
        1, lambda head, *_: head['param_shapes'][0].pop('b'), r'not at all \(b\)'
    ),
    'a frozen parameter is trained too': (
        3, lambda head, *_: head['param_shapes'][0].update(frozen=torch.Size((5,))),
        r'twice \(frozen\)',
    ),
    'the optimizer has fewer tensors': (
        0, lambda head, *_: head['optimizer']['param_groups'][0]['params'].pop(),
        'groups of 1 tensors, and the engine of 2',
    ),
    'the masters of a group are missing': (
        1, lambda _, optim, *rest: optim['single_partition_of_fp32_groups'].clear(),
        'the masters of 0 groups, of 1',
    ),
    'masters are cut off': (
        3, lambda _, optim, *rest: optim.update(fp32_flat_groups=[torch.ones(9)]),
        'holds 9 of 10 elements of the group of a, b',
    ),
    'a slice of a frozen parameter is cut off': (
        3, lambda head, *_: head['frozen_param_fragments'].update(frozen=torch.ones(4)),
        'holds 4 of 5 elements of frozen',
    ),
    'a text is none': (
        1, lambda _, optim, texts: texts.update({'loop_rank_0.json': '{'}), 'cannot be read'
    ),
    'an average is none': (
        1, lambda _, optim, texts: texts.update({'ema_rank_0.safetensors': 'x' * 99}),
        'cannot be read',
    ),
}  # fmt: skip


@pytest.mark.parametrize('what', HARMS)
def test_files_that_lack_something_are_refused(tmp_path, what):
    stage, harm, said = HARMS[what]
    names = written(tmp_path, stage, harm)
    with pytest.raises(CheckpointError, match=said):
        prove(tmp_path, names, wanted(stage))


def test_an_outline_is_the_file_without_its_values(tmp_path):
    weight = torch.arange(6.0).view(2, 3).bfloat16()
    value = {
        'module': OrderedDict(a=weight, b=torch.nn.Parameter(torch.ones(4))),
        'step': torch.tensor(7.0),
        'shape': torch.Size([2, 3]),
        'stage': ZeroStageEnum.weights,
        'scaler': LossScaler(1.0),
        'place': fragment_address(3, 4),
        'names': {'x'},
        'numbers': [1, 2.5, None, True, 'text', 1 << 70],
    }
    path = write(tmp_path / 'shard.pt', value)
    found = outline(path)
    assert found['module']['a'].shape == (2, 3)
    assert found['module']['a'].dtype == torch.bfloat16
    assert found['module']['a'].is_meta
    assert found['module']['b'].shape == (4,)
    assert found['step'].dim() == 0
    assert found['shape'] == (2, 3)
    assert found['stage'] == 3
    assert found['names'] == {'x'}
    assert found['numbers'] == value['numbers']
    assert read_shard(path)['numbers'] == value['numbers']  # and the reader agrees


def test_an_outline_knows_nothing_that_the_reader_would_refuse(tmp_path):
    """What it takes by itself has to be a part of what a load takes."""
    instances = {
        '_rebuild_tensor_v2': torch.ones(2),
        '_rebuild_parameter': torch.nn.Parameter(torch.ones(2)),
        '_rebuild_from_type_v2': with_attribute(torch.ones(2)),
        'Tensor': with_attribute(torch.ones(2)),
        'Size': torch.Size([2]),
        'OrderedDict': OrderedDict(a=1),
        'set': {1},
        'ZeroStageEnum': ZeroStageEnum.gradients,
        'LossScaler': LossScaler(2.0),
        'DynamicLossScaler': __import__(
            'deepspeed.runtime.fp16.loss_scaler', fromlist=['x']
        ).DynamicLossScaler(2.0, 2.0, 1000, 1, 1, False, False),
        'fragment_address': fragment_address(1, 2),
    }
    assert {name for _, name in _KNOWN} == instances.keys()
    for name, value in instances.items():
        read_shard(write(tmp_path / f'{name}.pt', {'value': value}))


def with_attribute(tensor):
    tensor.note = 'kept'
    return tensor


class Payload:
    def __reduce__(self):
        return io.StringIO, ('x',)


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    'value',
    [
        Payload(),
        Path('x'),
        slice(1),
        frozenset({1}),
        torch.ones(2).as_subclass(Subclass),
        pickle.Pickler,
        1j,
        b'bytes',
        torch.Generator(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_outline_does_not_know_is_decided_by_the_reader(tmp_path, value):
    try:
        path = write(tmp_path / 'shard.pt', {'value': value})
    except TypeError:
        pytest.skip('cannot be pickled at all')
    reasons = []
    for read in (read_shard, outline):
        try:
            read(path)
            reasons.append('read')
        except CheckpointError as error:
            reasons.append(str(error))
    assert reasons[0] == reasons[1]


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_what_is_unfrozen_or_frozen_after_initialize_is_saved_as_it_is(tmp_path, precision):
    result = run_ranks(proving.unfreeze, 2, tmp_path, root=tmp_path, precision=precision)
    for report in result:
        for stage in map(str, STAGES):
            seen = report[stage]
            assert any('no optimizer trains them' in text for text in seen['said']), stage
            assert any('frozen.weight, frozen.bias' in text for text in seen['said']), stage
            assert seen['unfrozen stays'], stage
            assert seen['frozen stays'], stage
            for target in STAGES:
                assert seen[f'to {target}'] == [], f'{stage} -> {target}'
    # an export has the masters, and an average is fp32: a bf16 engine computes with them rounded
    if precision == 'fp32':
        for stage in map(str, STAGES):
            assert result[0][stage]['exported'] == result[0][stage]['averaged'] == []


@pytest.mark.ranks
# An earlier DeepSpeed moves them in bf16 at stage 0, and is refused.
@pytest.mark.parametrize('precision', ['fp32', *([] if OLD_DEEPSPEED else ['bf16'])])
@pytest.mark.parametrize('stage', [0, 1, 3])
def test_frozen_parameters_among_the_optimizers_are_saved_and_go_on(tmp_path, stage, precision):
    """``AdamW(model.parameters())`` where some are frozen: DeepSpeed drops them from the groups."""
    (differences,) = run_ranks(
        proving.frozen_in_groups, 1, tmp_path, root=tmp_path, stage=stage, precision=precision
    )
    assert len(differences) == 2
    assert not any(differences.values()), differences


@pytest.mark.first
@pytest.mark.ranks
@pytest.mark.parametrize('in_background', [False, True])
def test_a_save_that_no_load_would_take_is_refused_and_the_earlier_tags_stay(
    tmp_path, in_background
):
    results = run_ranks(
        proving.refuse, 2, tmp_path, root=tmp_path, stages=STAGES,
        in_background=in_background,
    )  # fmt: skip
    for rank, result in enumerate(results):
        for stage in map(str, STAGES):
            seen, where = result[stage], f'stage {stage}, rank {rank}'
            assert seen['object'].startswith('CheckpointError: '), where
            assert 'tests.checkpoint.proving.Note' in seen['object'], where
            assert '\n' not in seen['object'], where
            assert 'numpy' in seen['numpy'], where
            assert 'new: extra' in seen['new'], where
            assert 'head.weight' in seen['replaced'], where
            assert 'before initialize' in seen['replaced'], where
            scripts = ('ds_config.json', 'zero_to_fp32.py', 'zero_to_torch.py')
            tags = [name for name in seen['tags'] if name not in scripts]
            assert tags == ['ckpt_epoch_0', 'latest'], where
            assert seen['latest'] == 'ckpt_epoch_0', where
            assert seen['then'] == 'ckpt_epoch_1', where
            assert seen['loads'] == [], where
