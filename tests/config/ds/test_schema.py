"""The schema is the installed DeepSpeed's, not a list of ours."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import Field

from internvl_ds.config.ds import schema as ds_schema
from internvl_ds.config.ds.check import check
from internvl_ds.config.ds.schema import (
    BOOL,
    INT,
    LIST,
    NULL,
    NUMBER,
    OBJECT,
    TEXT,
    build,
    find,
    walk,
)
from internvl_ds.config.tree import default_config


@pytest.fixture(scope='module')
def schema() -> ds_schema.Key:
    return build()


def at(schema: ds_schema.Key, pointer: str) -> ds_schema.Key:
    key = find(schema, pointer.strip('/').split('/'))
    assert key is not None, pointer
    return key


@pytest.mark.parametrize(
    ('pointer', 'kinds'),
    [
        ('/train_batch_size', (INT,)),
        ('/gradient_clipping', (NUMBER,)),
        ('/wall_clock_breakdown', (BOOL,)),  # by its default
        ('/zero_optimization', (OBJECT,)),
        ('/zero_optimization/stage', (INT,)),
        ('/zero_optimization/overlap_comm', (BOOL, NULL)),  # an optional field
        ('/zero_optimization/offload_param', (OBJECT, NULL)),
        ('/zero_optimization/offload_param/device', (TEXT,)),  # an enum, two blocks down
        ('/zero_optimization/offload_optimizer/ratio', (NUMBER,)),
        ('/zero_optimization/zenflow/update_interval', (TEXT, INT)),  # a union
        ('/fp16/loss_scale', (NUMBER,)),
        ('/bf16/enabled', (BOOL,)),
        ('/torch_autocast/lower_precision_safe_modules', (LIST,)),
        ('/activation_checkpointing/cpu_checkpointing', (BOOL,)),
        ('/checkpoint/writer/io_buffer_size', (INT,)),  # a block in a block, both optional
        ('/tensorboard/job_name', (TEXT,)),  # a model inside a model
        ('/timers/throughput/enabled', (BOOL,)),
        ('/data_efficiency/data_sampling/dynamic_batching/min_batch_size', (INT,)),
        ('/autotuning/model_info/profile', (BOOL,)),
    ],
)
def test_keys_and_types_at_every_depth(schema, pointer, kinds):
    assert at(schema, pointer).value.kinds == kinds


def test_limits_choices_defaults_and_deprecation_are_the_models(schema):
    assert at(schema, '/zero_optimization/stage').value.choices == (0, 1, 2, 3)
    assert at(schema, '/zero_optimization/reduce_bucket_size').value.above == 0
    assert at(schema, '/zero_optimization/offload_optimizer/ratio').value.most == 1
    assert at(schema, '/zero_optimization/offload_param/device').value.choices == (
        'none', 'cpu', 'nvme',
    )  # fmt: skip
    assert at(schema, '/zero_optimization/stage3_prefetch_bucket_size').default == 5e7
    old = at(schema, '/zero_optimization/cpu_offload')
    assert (old.deprecated, old.successor) == (True, 'offload_optimizer')
    both = [at(schema, f'/zero_optimization/{name}') for name in (
        'prefetch_bucket_size', 'stage3_prefetch_bucket_size',
    )]  # fmt: skip
    assert both[0] is both[1]


def test_every_field_of_every_model_is_known(schema):
    models = [(key, key.model) for _, key in walk(schema) if key.model is not None]
    assert len(models) > 15
    for key, model in models:
        for name, field in model.model_fields.items():
            assert {name, field.alias or name} <= set(key.keys or {})


def test_what_is_only_read_to_be_refused_is_no_known_key(schema):
    for pointer in ('/amp', '/elasticity', '/zero_optimization/mics_shard_size'):
        assert 'removed' in at(schema, pointer).refused
    assert not at(schema, '/fp16').refused


def test_blocks_that_are_copied_whole_may_hold_more(schema):
    learning = at(schema, '/data_efficiency/data_sampling/curriculum_learning')
    assert not learning.complete
    assert at(schema, '/fp16').complete


def test_a_field_that_a_version_adds_is_known_and_one_that_it_drops_is_not(monkeypatch):
    class Next(DeepSpeedZeroConfig):
        stage4_helpers: int = Field(4, gt=0)

    config = default_config()
    tree = {'zero_optimization': {'stage': 3, 'stage4_helpers': 0}}
    assert 'unknown key' in str(check(tree, config, 1)[0])
    monkeypatch.setattr('deepspeed.runtime.zero.config.DeepSpeedZeroConfig', Next)
    monkeypatch.setattr('internvl_ds.config.ds.check.installed', build)
    (found,) = check(tree, config, 1)
    assert str(found) == '/zero_optimization/stage4_helpers: is 0; it must be more than 0'

    class Less(DeepSpeedConfigModel):
        stage: int = 0

    monkeypatch.setattr('deepspeed.runtime.zero.config.DeepSpeedZeroConfig', Less)
    assert set(at(build(), '/zero_optimization').keys or {}) == {
        'stage', 'mics_shard_size', 'mics_hierarchical_params_gather', 'zeropp_loco_param',
    }  # fmt: skip


@pytest.mark.parametrize(
    ('name', 'on_cpu', 'params', 'takes', 'not_takes'),
    [
        ('AdamW', False, {}, {'lr', 'betas', 'adam_w_mode', 'torch_adam', 'set_grad_none'},
         {'momentum', 'foreach', 'model_params', 'params'}),
        ('AdamW', True, {}, {'lr', 'fp32_optimizer_states'}, {'set_grad_none', 'foreach'}),
        ('adam', False, {'torch_adam': True}, {'amsgrad', 'foreach'}, {'set_grad_none'}),
        ('Lamb', False, {}, {'max_coeff'}, {'momentum'}),
        ('SGD', False, {}, {'lr', 'momentum', 'nesterov'}, {'betas'}),
    ],
)  # fmt: skip
def test_optimizer_params_are_the_arguments_of_the_class(name, on_cpu, params, takes, not_takes):
    key = ds_schema.optimizer_params(name, params, on_cpu)
    assert key is not None
    assert key.complete
    assert takes <= set(key.keys or {})
    assert not not_takes & set(key.keys or {})


def test_every_optimizer_and_scheduler_of_the_installed_versions_can_be_looked_at():
    for name in ds_schema.optimizer_types():
        key = ds_schema.optimizer_params(name, {}, on_cpu=False)
        assert key is None or 'lr' in (key.keys or {}), name
    assert {'AdamW', 'SGD', 'lion'} <= set(ds_schema.optimizer_types())
    for name in ds_schema.scheduler_types():
        assert ds_schema.scheduler_params(name).keys, name
    assert ds_schema.scheduler_params('WarmupDecayLR').required == ('total_num_steps',)
    assert hasattr(torch.optim.lr_scheduler, ds_schema.scheduler_types()[-1])
