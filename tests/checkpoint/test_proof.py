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
from internvl_ds.errors import CheckpointError
from tests.harness.ranks import run_ranks

STAGES = [0, 1, 2, 3]


def write(path, value):
    torch.save(value, path, pickle_module=PortablePickle)
    return path


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
    result = run_ranks(
        'tests.workers.proving:unfreeze', 2, tmp_path, root=tmp_path, precision=precision
    )
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
@pytest.mark.parametrize('in_background', [False, True])
def test_a_save_that_no_load_would_take_is_refused_and_the_earlier_tags_stay(
    tmp_path, in_background
):
    results = run_ranks(
        'tests.workers.proving:refuse', 2, tmp_path, root=tmp_path, stages=STAGES,
        in_background=in_background,
    )  # fmt: skip
    for rank, result in enumerate(results):
        for stage in map(str, STAGES):
            seen, where = result[stage], f'stage {stage}, rank {rank}'
            assert seen['object'].startswith('CheckpointError: '), where
            assert 'tests.workers.proving.Note' in seen['object'], where
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
