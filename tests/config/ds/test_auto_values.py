"""What is filled from the yacs config and from the model, and where each value comes from."""

import json

import pytest

from internvl_ds.config.ds import resolve as ds
from internvl_ds.errors import ConfigError
from tests.config.ds import filling
from tests.harness.model import make_config
from tests.harness.ranks import run_ranks


def _zero(stage, **more):
    return {'zero_optimization': {'stage': stage, **more}}


def _bucket(tree, trained):
    zero = ds.resolve_or_raise(tree, make_config(), 2, trained)['zero_optimization']
    return zero.get('reduce_bucket_size')


@pytest.mark.parametrize('stage', [1, 2, 3])
def test_the_reduce_bucket_is_as_large_as_the_model_and_no_larger_than_deepspeeds(stage):
    assert _bucket(_zero(stage), 22_000_000) == 22_000_000
    assert _bucket(_zero(stage, reduce_bucket_size='auto'), 6_000_000_000) == 500_000_000
    assert _bucket(_zero(stage, reduce_bucket_size=7), 22_000_000) == 7


def test_deepspeed_waits_for_the_device_in_each_pass_only_where_it_was_told_to():
    def timers(tree):
        return ds.resolve_or_raise(tree, make_config(), 2, 7)['timers']['throughput']

    assert timers({}) == {'enabled': False}
    own = {'enabled': True, 'synchronized': True}
    assert timers({'timers': {'throughput': own}}) == own


def test_other_buckets_at_auto_are_deepspeeds_own():
    names = ('allgather_bucket_size', 'stage3_prefetch_bucket_size')
    got = ds.resolve_or_raise(_zero(3, **dict.fromkeys(names, 'auto')), make_config(), 2, 1000)
    zero = got['zero_optimization']
    assert [zero[name] for name in names] == [500_000_000, 50_000_000]
    assert _bucket(_zero(0, reduce_bucket_size='auto'), 1000) == 500_000_000
    assert _bucket(_zero(0), 1000) is None


def test_before_there_is_a_model_bucket_sizes_stay_open_and_nothing_else():
    early = ds.resolve_or_raise(_zero(2, reduce_bucket_size='auto'), make_config(), 2)
    assert early['zero_optimization'] == {'stage': 2, 'reduce_bucket_size': 'auto'}
    assert (
        ds.resolve_or_raise(early, make_config(), 2, 10)['zero_optimization']['reduce_bucket_size']
        == 10
    )
    own = _zero(3, zenflow={'topk_ratio': 0.1, 'select_interval': 'auto'})
    assert (
        ds.resolve_or_raise(own, make_config(), 2, 1)['zero_optimization']['zenflow']
        == own['zero_optimization']['zenflow']
    )  # DeepSpeed's own word
    with pytest.raises(ConfigError, match=r"/zero_optimization/sub_group_size: 'auto' has no"):
        ds.resolve_or_raise(_zero(3, sub_group_size='auto'), make_config(), 2)


@pytest.mark.parametrize('params', [{}, None])
@pytest.mark.parametrize(
    ('name', 'taken'),
    [
        ('AdamW', ('lr', 'weight_decay', 'betas', 'eps')),
        ('Adam', ('lr', 'weight_decay', 'betas', 'eps')),
        ('Lion', ('lr', 'weight_decay', 'betas')),
        ('SGD', ('lr', 'weight_decay', 'momentum')),
    ],
)
def test_an_optimizer_takes_what_it_knows_of_the_yacs_config(name, taken, params):
    config = make_config(
        DATA__BATCH_SIZE=64,
        TRAIN__BASE_LR=1e-3,
        TRAIN__WEIGHT_DECAY=0.1,
        TRAIN__OPTIMIZER__BETAS=(0.9, 0.98),
        TRAIN__OPTIMIZER__EPS=1e-6,
    )
    values = {
        'lr': 1e-3 * 256 / 512, 'weight_decay': 0.1, 'betas': [0.9, 0.98], 'eps': 1e-6,
        'momentum': 0.9,
    }  # fmt: skip
    section = {'type': name, 'params': dict.fromkeys(taken, 'auto')}
    if params is not None:
        section['params'] = params
    got = ds.resolve_or_raise({'optimizer': section}, config, 4)
    assert got['optimizer']['params'] == {key: values[key] for key in taken}


def test_what_both_state_of_an_optimizer_must_agree():
    def resolve(params, **values):
        tree = {'optimizer': {'type': 'AdamW', 'params': params}}
        return ds.resolve_or_raise(tree, make_config(**values), 4)['optimizer']['params']

    changed = {'TRAIN__BASE_LR': 1e-3, 'DATA__BATCH_SIZE': 128}
    assert resolve({'lr': 3e-4})['lr'] == 3e-4  # yacs is at its default
    assert resolve({'lr': 1e-3}, **changed)['lr'] == 1e-3
    with pytest.raises(ConfigError, match=r'/lr is 0.0003 .* TRAIN.BASE_LR x 512 / 512 is 0.001'):
        resolve({'lr': 3e-4}, **changed)
    with pytest.raises(ConfigError, match=r'/betas is \[0.9, 0.9\] .* TRAIN.OPTIMIZER.BETAS is'):
        resolve({'betas': [0.9, 0.9]}, TRAIN__OPTIMIZER__BETAS=(0.9, 0.95))


def test_a_scheduler_takes_its_learning_rates_and_asks_for_its_steps():
    config = make_config(
        DATA__BATCH_SIZE=128, TRAIN__BASE_LR=1e-3, TRAIN__WARMUP_LR=1e-6, TRAIN__MIN_LR=1e-5
    )

    def resolve(name, params):
        tree = {'scheduler': {'type': name, 'params': params}}
        return ds.resolve_or_raise(tree, config, 8)['scheduler']['params']

    linear = {'warmup_min_lr': 'auto', 'warmup_max_lr': 'auto', 'warmup_num_steps': 10}
    assert resolve('WarmupLR', linear) == {
        'warmup_min_lr': 2e-6, 'warmup_max_lr': 2e-3, 'warmup_num_steps': 10,
    }  # fmt: skip
    cosine = {'warmup_min_ratio': 'auto', 'cos_min_ratio': 'auto', 'total_num_steps': 5}
    got = resolve('WarmupCosineLR', cosine)
    assert got['warmup_min_ratio'] == pytest.approx(1e-3)
    assert got['cos_min_ratio'] == pytest.approx(1e-2)
    with pytest.raises(ConfigError, match=r"/scheduler/params/total_num_steps is 'auto'.*give the"):
        resolve('WarmupDecayLR', {'total_num_steps': 'auto'})


def test_every_value_has_an_origin():
    tree = {
        'gradient_clipping': 0.5,
        'bf16': {'enabled': 'auto'},
        'zero_optimization': {'stage': 2, 'offload_optimizer': {'device': 'cpu'}},
        'optimizer': {'type': 'AdamW', 'params': {'lr': 1e-3, 'eps': 'auto'}},
    }
    before = json.dumps(tree)
    config = make_config(AMP_OPT_LEVEL='O2', AMP_TYPE='bfloat16', DATA__BATCH_SIZE=4)
    got, origins, _ = ds.resolve(tree, config, 2, 99)

    assert json.dumps(tree) == before

    def leaves(node, pointer=''):
        if isinstance(node, dict):
            for key, value in node.items():
                yield from leaves(value, f'{pointer}/{key}')
        else:
            yield pointer

    assert set(leaves(got)) == set(origins)
    stated = {pointer for pointer, origin in origins.items() if origin == 'the ds_config'}
    assert stated == {
        '/gradient_clipping', '/zero_optimization/stage',
        '/zero_optimization/offload_optimizer/device', '/optimizer/type', '/optimizer/params/lr',
    }  # fmt: skip
    assert origins['/train_micro_batch_size_per_gpu'] == 'DATA.BATCH_SIZE'
    assert origins['/train_batch_size'] == '4 images x 1 accumulation steps x 2 ranks'
    assert origins['/bf16/enabled'] == 'AMP_OPT_LEVEL and AMP_TYPE'
    assert origins['/optimizer/params/eps'] == 'TRAIN.OPTIMIZER.EPS'
    assert origins['/zero_optimization/reduce_bucket_size'].startswith('the model: 99 trained')


@pytest.mark.first
@pytest.mark.ranks
def test_a_bucket_of_the_models_size_changes_no_bit_and_takes_less(tmp_path):
    """At stages 1 to 3; what was filled is in OUTPUT, in state.json, and in DeepSpeed's shard."""
    for result in run_ranks(filling.buckets, 2, tmp_path, output=str(tmp_path)):
        for stage in '123':
            filled, stated = result[stage]['filled'], result[stage]['stated']
            assert filled['steps'] == stated['steps']
            assert stated['bucket'] == 50_000_000
            assert filled['bucket'] == result['trained']
            assert filled['recorded'] == [filled['bucket']] * 3
        # Stage 3 keeps its bucket: 4 bytes an element in fp32, but for what the heap does.
        more = result['3']['stated']['bytes'] - result['3']['filled']['bytes']
        assert more > 0.9 * 4 * 50_000_000


@pytest.mark.ranks
def test_an_optimizer_of_the_json_is_made_from_the_yacs_config(tmp_path):
    for result in run_ranks(filling.json_optimizer, 2, tmp_path):
        assert result == {'lr': 1e-3 * 16 / 512, 'weight_decay': 0.1, 'betas': [0.9, 0.98]}
