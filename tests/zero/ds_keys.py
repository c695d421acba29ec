"""Settings of a ds_config that train right: what ranks do with each in test_ds_keys.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from internvl_ds import NativeScalerWithGradNormCount, initialize
from internvl_ds.dist.rendezvous import world_size
from tests.engine.stepping import train_step
from tests.harness.model import make_config, make_model, make_sgd
from tests.harness.training import whole_weights

STEPS, ACCUMULATION, CLIP = 3, 2, 0.5

CPU: dict[str, Any] = {'device': 'cpu'}
# Pointer of a key -> the stages at which it is tried, and what is stated.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    '/comms_logger': ((0, 2, 3), {'comms_logger': {'enabled': True, 'verbose': True}}),
    '/communication_data_type': ((0, 1, 2, 3), {'communication_data_type': 'fp32'}),
    '/csv_monitor': ((2,), {'csv_monitor': {'enabled': True, 'output_path': 'monitors'}}),
    '/disable_python_gc': ((0,), {'disable_python_gc': True}),
    '/dump_state': ((0, 3), {'dump_state': True}),
    '/flops_profiler': ((0, 2, 3), {'flops_profiler': {'enabled': True, 'profile_step': 2}}),
    '/gradient_predivide_factor': ((0, 1), {'gradient_predivide_factor': 4.0}),
    '/prescale_gradients': ((0, 1), {'prescale_gradients': True}),
    '/log_level': ((0,), {'log_level': 'debug'}),
    '/memory_breakdown': ((0, 3), {'memory_breakdown': True}),
    '/steps_per_print': ((0,), {'steps_per_print': 1}),
    '/timers/throughput': ((0,), {'timers': {'throughput': {'synchronized': False}}}),
    '/wall_clock_breakdown': ((0, 1, 2, 3), {'wall_clock_breakdown': True}),
}
# The same for keys of /zero_optimization.
ZERO: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    'contiguous_gradients': ((1, 2, 3), {'contiguous_gradients': False}),
    'reduce_scatter': ((1, 2, 3), {'reduce_scatter': False}),
    'reduce_bucket_size': ((1, 2, 3), {'reduce_bucket_size': 100}),
    'use_multi_rank_bucket_allreduce': ((1, 2), {'use_multi_rank_bucket_allreduce': False}),
    'allgather_partitions': ((1, 2), {'allgather_partitions': False}),
    'allgather_bucket_size': ((1, 2, 3), {'allgather_bucket_size': 100}),
    'overlap_comm': ((1, 2, 3), {'overlap_comm': True}),
    'ignore_unused_parameters': ((1, 2, 3), {'ignore_unused_parameters': False}),
    'round_robin_gradients': ((1, 2), {'round_robin_gradients': True}),
    'parameter_alignment': ((1, 2), {'parameter_alignment': True}),
    'enable_sanity_checks': ((3,), {'enable_sanity_checks': True}),
    'offload_optimizer': ((1, 2, 3), {'offload_optimizer': {**CPU, 'pin_memory': False}}),
    'offload_optimizer/fast_init': ((3,), {'offload_optimizer': {**CPU, 'fast_init': True}}),
    'offload_param': ((3,), {'offload_param': CPU}),
    'sub_group_size': ((3,), {'sub_group_size': 100}),
    'stage3_prefetch_bucket_size': ((3,), {'stage3_prefetch_bucket_size': 10}),
    'stage3_param_persistence_threshold': ((3,), {'stage3_param_persistence_threshold': 50}),
    'stage3_model_persistence_threshold': ((3,), {'stage3_model_persistence_threshold': 50}),
    'stage3_max_live_parameters': ((3,), {'stage3_max_live_parameters': 10}),
    'stage3_max_reuse_distance': ((3,), {'stage3_max_reuse_distance': 10}),
    'stage3_gather_16bit_weights_on_model_save': (
        (3,), {'stage3_gather_16bit_weights_on_model_save': True}),
    'stage3_module_granularity_threshold': ((3,), {'stage3_module_granularity_threshold': 100}),
    'stage3_use_all_reduce_for_fetch_params': (
        (3,), {'stage3_use_all_reduce_for_fetch_params': True}),
    'stage3_allgather_sequential': ((3,), {'stage3_allgather_sequential': True}),
    'zero_hpz_partition_size': ((3,), {'zero_hpz_partition_size': 2}),
    'memory_efficient_linear': ((3,), {'memory_efficient_linear': False}),
    'pipeline_loading_checkpoint': ((3,), {'pipeline_loading_checkpoint': True}),
    'override_module_apply': ((3,), {'override_module_apply': False}),
    'log_trace_cache_warnings': ((3,), {'log_trace_cache_warnings': True}),
    'leaf_module': ((3,), {'leaf_module': {'classes': [], 'names': ['body']}}),
    'save_muon_momentum_buffer_in_memory': (
        (3,), {'save_muon_momentum_buffer_in_memory': True}),
}  # fmt: skip


def cases() -> dict[str, tuple[int, dict[str, Any]]]:
    """Name -> stage and ds_config."""
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for pointer, (stages, tree) in CASES.items():
        for stage in stages:
            found[f'{pointer} at {stage}'] = stage, tree
    for key, (stages, zero) in ZERO.items():
        for stage in stages:
            found[f'/zero_optimization/{key} at {stage}'] = stage, {'zero_optimization': zero}
    return found


def train_all(folder: str, only: str = '') -> dict[str, Any]:
    """The weights after STEPS updates with each setting, or the error."""
    found: dict[str, Any] = {}
    for name, (stage, tree) in cases().items():
        if only not in name:
            continue
        zero = {'stage': stage, **tree.get('zero_optimization', {})}
        if stage == 3:
            zero = {'stage3_param_persistence_threshold': 0, **zero}
        tree = {**tree, 'zero_optimization': zero, 'zero_force_ds_cpu_optimizer': False}
        if 'csv_monitor' in tree:
            tree['csv_monitor'] = {**tree['csv_monitor'], 'output_path': f'{folder}/monitors'}
        try:
            found[name] = _train(tree)
        except Exception as error:
            found[name] = f'{type(error).__name__}: {error}'
    shutil.rmtree(Path(folder, 'monitors'), ignore_errors=True)
    return found


def _train(tree: dict[str, Any]) -> dict[str, list[float]]:
    config = make_config(
        DATA__BATCH_SIZE=16 // ACCUMULATION // world_size(),
        TRAIN__ACCUMULATION_STEPS=ACCUMULATION, TRAIN__CLIP_GRAD=CLIP,
    )  # fmt: skip
    model = make_model()
    engine, optimizer = initialize(config, model, make_sgd(model), tree)
    scaler = NativeScalerWithGradNormCount()
    for step in range(STEPS):
        train_step(engine, optimizer, scaler, step, CLIP, ACCUMULATION)
    # In fp32; DeepSpeed's safe_get_full_fp32_param is wrong with round_robin_gradients.
    weights = whole_weights(engine)
    engine.destroy()
    return {name: weights[name].flatten().tolist() for name in weights}
