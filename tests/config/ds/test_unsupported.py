"""The cells that the bridge cannot mend, in a ds_config of plain DeepSpeed."""

from __future__ import annotations

import re

import pytest

from internvl_ds.config.ds.unsupported import unsupported_settings


def zero(stage):
    return {'zero_optimization': {'stage': stage}}


ADAM = {'optimizer': {'type': 'Adam'}}
IN_FP32 = {'data_types': {'grad_accum_dtype': 'fp32'}}


@pytest.mark.parametrize(
    ('tree', 'low', 'pointers'),
    [
        ({}, None, []),
        ({'managed_gradient_accumulation': False}, None, ['/managed_gradient_accumulation']),
        ({'bf16': {'check_grad_overflow': False}}, 'bf16', ['/bf16/check_grad_overflow']),
        ({'bf16': {'check_grad_overflow': False}}, None, []),
        ({'zero_optimization': {'stage': 2, 'compute_grad_norm': False}}, None,
         ['/zero_optimization/compute_grad_norm']),
        (IN_FP32, 'fp16', ['/data_types/grad_accum_dtype']),
        ({**zero(1), **IN_FP32}, 'bf16', ['/data_types/grad_accum_dtype']),
        ({**zero(1), **IN_FP32}, 'fp16', []),
        ({**zero(2), **IN_FP32}, 'bf16', []),
        (IN_FP32, None, []),
        ({'data_types': {'grad_accum_dtype': 'bfloat16'}}, 'bf16', []),
        (ADAM, 'bf16', ['/optimizer']),
        (ADAM, None, []),
        ({**zero(1), **ADAM}, 'bf16', []),
    ],
)  # fmt: skip
def test_cells(tree, low, pointers):
    assert [found.pointer for found in unsupported_settings(tree, low)] == pointers


def test_a_section_that_is_not_used_is_no_matter():
    assert list(unsupported_settings(ADAM, 'bf16', optimizer=False)) == []


@pytest.mark.parametrize(
    ('section', 'pointer'),
    [
        ({'offload_optimizer': {'device': 'cpu'}}, '/zero_optimization/offload_optimizer'),
        ({'offload_optimizer': {'device': 'none'}}, None),
        ({'contiguous_gradients': False}, '/zero_optimization/contiguous_gradients'),
        (
            {'stage3_use_all_reduce_for_fetch_params': True},
            '/zero_optimization/stage3_use_all_reduce_for_fetch_params',
        ),
    ],
)
def test_what_only_an_earlier_deepspeed_does_wrong(section, pointer):
    tree = {'zero_optimization': {'stage': 2, **section}}
    assert list(unsupported_settings(tree, None)) == []
    found = list(unsupported_settings(tree, None, version='0.18.9'))
    assert [f.pointer for f in found] == ([pointer] if pointer else [])
    assert all('install deepspeed>=0.19.8' in f.message for f in found)


@pytest.mark.parametrize('version', ['0.17.5', '0.18.0', '0.18.3', '0.18.8'])
def test_a_deepspeed_that_is_not_supported_is_an_error_that_names_it(version):
    (found,) = unsupported_settings({}, None, version=version)
    assert re.match(f'DeepSpeed {version} trains .* install deepspeed>=0.18.9$', str(found))


@pytest.mark.parametrize('version', ['0.17.6', '0.18.9', '0.19.0rc1', '0.19.8', '0.20.0'])
def test_a_supported_deepspeed_is_none(version):
    assert list(unsupported_settings({}, None, version=version)) == []


def test_accumulation_in_fp32_at_stage_1_is_refused_in_fp16_too_before():
    tree = {**zero(1), **IN_FP32}
    assert [f.pointer for f in unsupported_settings(tree, 'fp16', version='0.18.9')] == [
        '/data_types/grad_accum_dtype'
    ]
