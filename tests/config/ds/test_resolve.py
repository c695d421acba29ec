"""ds_config: loading, resolution against the yacs config, precision, errors by message."""

import json

import pytest
import torch

from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.ds.load import load_ds_config
from internvl_ds.errors import ConfigError
from tests.harness.model import make_config


def _resolved(tree, world_size=2, **values):
    return ds.resolve_or_raise(tree, make_config(**values), world_size)


@pytest.mark.parametrize('name', ['zero0', 'zero1', 'zero2', 'zero3', 'zero3_offload'])
def test_what_ships_resolves_in_fp32_and_bf16(name):
    tree = load_ds_config(name)
    low = _resolved(tree, AMP_OPT_LEVEL='O2', AMP_TYPE='bfloat16', DATA__BATCH_SIZE=4)
    assert low['bf16']['enabled'] is True
    assert low['train_batch_size'] == 8
    assert low['zero_optimization']['stage'] == int(name[4])
    assert _resolved(tree)['bf16']['enabled'] is False
    assert 'auto' not in json.dumps(low)


@pytest.mark.parametrize(('stated', 'stage'), [(None, 1), ('auto', 1), (0, 0), (2, 2)])
def test_use_zero_shards_the_optimizer_where_no_stage_is_stated(stated, stage):
    tree = {} if stated is None else {'zero_optimization': {'stage': stated}}
    got = ds.resolve(tree, make_config(TRAIN__OPTIMIZER__USE_ZERO=True), 2)
    assert got.tree['zero_optimization']['stage'] == stage
    origin = 'TRAIN.OPTIMIZER.USE_ZERO' if stage == 1 else 'the ds_config'
    assert got.origins['/zero_optimization/stage'] == origin


def test_auto_and_absent_fields_come_from_the_yacs_config():
    for tree in ({}, {'train_batch_size': 'auto', 'gradient_clipping': 'auto'}):
        got = _resolved(
            tree, 4, DATA__BATCH_SIZE=6, TRAIN__ACCUMULATION_STEPS=3, TRAIN__CLIP_GRAD=1.5
        )
        assert got['train_micro_batch_size_per_gpu'] == 6
        assert got['gradient_accumulation_steps'] == 3
        assert got['train_batch_size'] == 72
        assert got['gradient_clipping'] == 1.5
        assert got['zero_optimization']['stage'] == 0
    assert _resolved({}, TRAIN__CLIP_GRAD=None)['gradient_clipping'] == 0.0


def test_an_explicit_number_wins_where_yacs_is_at_its_default():
    config = make_config()
    tree = {'train_micro_batch_size_per_gpu': 8, 'gradient_clipping': 0.5}
    got = ds.resolve_or_raise({**tree, 'gradient_accumulation_steps': 4}, config, 1)
    assert got['train_batch_size'] == 32
    ds.adopt(config, got)
    assert (config.DATA.BATCH_SIZE, config.TRAIN.ACCUMULATION_STEPS) == (8, 4)
    assert config.TRAIN.CLIP_GRAD == 0.5
    assert config.is_frozen()


@pytest.mark.parametrize(
    ('tree', 'values', 'message'),
    [
        (
            {'train_micro_batch_size_per_gpu': 8},
            {'DATA__BATCH_SIZE': 4},
            '/train_micro_batch_size_per_gpu is 8 in the ds_config, but DATA.BATCH_SIZE is 4',
        ),
        (
            {'gradient_accumulation_steps': 2},
            {'TRAIN__ACCUMULATION_STEPS': 4},
            '/gradient_accumulation_steps is 2 .* TRAIN.ACCUMULATION_STEPS is 4',
        ),
        (
            {'gradient_clipping': 2.0},
            {'TRAIN__CLIP_GRAD': 1.0},
            '/gradient_clipping is 2.0 .* TRAIN.CLIP_GRAD is 1.0',
        ),
        (
            {'train_batch_size': 7},
            {'DATA__BATCH_SIZE': 4},
            '/train_batch_size is 7, but 4 images a micro-batch x 1 accumulation steps x 2 ranks',
        ),
        ({'train_micro_batch_size_per_gpu': 'many'}, {}, "is 'many'; it must be a number"),
        ({'zero_optimization': {'sub_group_size': 'auto'}}, {}, '/sub_group_size: .auto.'),
        ({'bf16': {'enabled': True}}, {}, "ds_config states bf16, but AMP_OPT_LEVEL 'O0'"),
        (
            {'bf16': {'enabled': False}},
            {'AMP_OPT_LEVEL': 'O2', 'AMP_TYPE': 'bfloat16'},
            'asks for bf16, but /bf16/enabled is false',
        ),
        ({'bf16': {'enabled': True}, 'fp16': {'enabled': True}}, {}, 'enabled together .* /fp16'),
        ({}, {'AMP_OPT_LEVEL': 'O3'}, "AMP_OPT_LEVEL is 'O3'"),
        ({}, {'AMP_TYPE': 'fp8'}, "AMP_TYPE is 'fp8'"),
    ],
)  # fmt: skip
def test_contradictions_name_both_places(tree, values, message):
    with pytest.raises(ConfigError, match=message):
        _resolved(tree, **values)


@pytest.mark.parametrize(
    ('level', 'amp_type', 'expected'),
    [
        ('O0', 'float16', ds.FP32),
        ('O1', 'float16', ds.AUTOCAST_FP16),
        ('O1', 'bfloat16', ds.AUTOCAST_BF16),
        ('O2', 'float16', ds.FP16),
        ('O2', 'bfloat16', ds.BF16),
        ('', 'float16', ds.AUTOCAST_FP16),
    ],
)
def test_the_precision_table(level, amp_type, expected):
    config = make_config(AMP_OPT_LEVEL=level, AMP_TYPE=amp_type)
    assert ds.precision({}, config) == expected
    resolved = ds.resolve_or_raise({}, config, 1)
    assert ds.precision(resolved, make_config(AMP_OPT_LEVEL='')) == expected or expected == ds.FP32


def test_a_precision_in_the_json_wins_over_defaults_only():
    bf16 = {'bf16': {'enabled': True}}
    assert ds.precision(bf16, make_config(AMP_OPT_LEVEL='')) == ds.BF16
    assert ds.precision(bf16, make_config(AMP_OPT_LEVEL='O2')) == ds.BF16
    off = {name: {'enabled': False} for name in ('fp16', 'bf16', 'torch_autocast')}
    assert ds.precision(off, make_config(AMP_OPT_LEVEL='')) == ds.FP32


def test_loading(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('{"gradient_clipping": 1, "gradient_clipping": 2}')
    with pytest.raises(ConfigError, match='stated twice: gradient_clipping'):
        load_ds_config(path)
    path.write_text('[1]')
    with pytest.raises(ConfigError, match='a list, not a JSON object'):
        load_ds_config(path)
    path.write_text('{')
    with pytest.raises(ConfigError, match='cannot be read as JSON'):
        load_ds_config(path)
    with pytest.raises(ConfigError, match=r'zero9: no such file, .*; near it: .*zero0'):
        load_ds_config('zero9')
    with pytest.raises(ConfigError, match=r'ds_config x{60}...: File name too long'):
        load_ds_config('x' * 5000)
    given = {'zero_optimization': {'stage': 1}}
    ds.resolve_or_raise(load_ds_config(given), make_config(), 1)
    assert given == {'zero_optimization': {'stage': 1}}


def test_a_mapping_is_copied_to_its_depth():
    given = {'zero_optimization': {'stage': 1}}
    load_ds_config(given)['zero_optimization']['stage'] = 3
    assert given == {'zero_optimization': {'stage': 1}}


def test_one_accumulation_step_and_none_mean_the_same():
    got = _resolved({'gradient_accumulation_steps': 0}, TRAIN__ACCUMULATION_STEPS=1)
    assert got['gradient_accumulation_steps'] == 1


def test_the_loss_scale_is_that_of_torchs_grad_scaler():
    got = _resolved({}, AMP_OPT_LEVEL='O1', AMP_TYPE='float16')['fp16']
    torchs = torch.amp.GradScaler('cpu').state_dict()
    assert 2 ** got['initial_scale_power'] == torchs['scale'] == 65536.0
    assert got['loss_scale_window'] == torchs['growth_interval'] == 2000
    assert (got['loss_scale'], got['hysteresis'], got['min_loss_scale']) == (0, 1, 1)


@pytest.mark.parametrize('stage', [0, 1, 2, 3])
def test_an_engine_without_an_optimizer_partitions_nothing_at_stages_1_and_2(stage):
    tree = {'zero_optimization': {'stage': stage}, 'optimizer': {}, 'bf16': {'enabled': True}}
    got = ds.for_inference(tree)
    assert got['zero_optimization']['stage'] == (stage if stage in (0, 3) else 0)
    assert 'optimizer' not in got
    assert tree['optimizer'] == {}
