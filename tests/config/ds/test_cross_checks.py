"""The rules keep silent where another fault was told; each contradiction is in test_ds_check."""

from __future__ import annotations

from typing import Any

import pytest

from internvl_ds.config.ds.cross_checks import RULES, Facts
from internvl_ds.config.ds.schema import installed
from internvl_ds.config.ds.validate_keys import check_shape
from internvl_ds.config.tree import default_config


def told(tree: dict[str, Any], optimizer_in_code: bool = True) -> list[str]:
    """Pointers of what the rules find, beside what the shape's check has found."""
    schema = installed()
    shape = check_shape(tree, schema, schema)
    facts = Facts(shape, schema, default_config(), 2, optimizer_in_code, False, False)
    return [found.pointer for rule in RULES for found in rule(facts)]


@pytest.mark.parametrize(
    'tree',
    [
        {'zero_optimization': {'stage': 4, 'stage3_max_live_parameters': 5}},
        {'zero_optimization': {'stage': '3', 'offload_param': {'device': 'cpu'}}},
        {'zero_optimization': {'stge': 3, 'offload_param': {'device': 'cpu'}}},
        {'zero_optimization': {'stage': 3, 'offload_param': {'device': 'gpu'}}},
        {'train_batch_size': 64, 'train_micro_batch_size_per_gpu': '32'},
        {'train_batch_size': 64, 'train_micro_batch_size_per_gpus': 32},
        {'bf16': {'enabled': 'yes'}, 'fp16': {'enabled': True}},
        {'optimizer': {'typ': 'AdamW', 'params': {'lr': 0.1}}},
        {'optimizer': {'type': 7, 'params': {'lrs': 0.1}}},
        {'optimizer': [], 'scheduler': {'type': 'WarmupLR'}},
    ],
    ids=str,
)
def test_a_value_that_is_wrong_by_itself_contradicts_nothing(tree):
    assert told(tree, optimizer_in_code=False) == []


def test_rules_speak_of_each_fault_by_itself():
    tree = {
        'train_batch_size': 100,
        'zero_optimization': {
            'stage': 1, 'stage3_max_live_parameters': 5, 'offload_param': {'device': 'cpu'},
        },
    }  # fmt: skip
    assert told(tree) == [
        '/train_batch_size',
        '/zero_optimization/stage3_max_live_parameters',
        '/zero_optimization/offload_param',
    ]


@pytest.mark.parametrize('stage', [0, 1, 2, 3])
def test_scaling_before_the_reduction_is_refused_at_stage_2_only(stage):
    tree = {'prescale_gradients': True, 'zero_optimization': {'stage': stage}}
    assert told(tree) == (['/prescale_gradients'] if stage == 2 else [])
