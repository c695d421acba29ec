"""Tables of ds_configs: faulty ones, each with its one finding, and right ones with none."""

from __future__ import annotations

from typing import Any

IN_JSON = {'optimizer_in_code': False}
BF16 = {'AMP_OPT_LEVEL': 'O2', 'AMP_TYPE': 'bfloat16'}
FP16 = {'AMP_OPT_LEVEL': 'O2'}


def zero(stage: Any, **more: Any) -> dict[str, Any]:
    return {'zero_optimization': {'stage': stage, **more}}


def adamw(**params: Any) -> dict[str, Any]:
    return {'optimizer': {'type': 'AdamW', 'params': {'lr': 1e-4, **params}}}


def warmup(**params: Any) -> dict[str, Any]:
    return {**adamw(), 'scheduler': {'type': 'WarmupLR', 'params': params}}


CPU = {'device': 'cpu'}
UNFORCED = {'zero_force_ds_cpu_optimizer': False}

# What is misspelt, or at the wrong place: the ds_config, the pointer, and words of the message.
TYPOS: list[tuple[dict[str, Any], str, str]] = [
    ({'gradient_cliping': 1.0}, '/gradient_cliping', 'nearest known key is /gradient_clipping'),
    ({'train_batch_sise': 'auto'}, '/train_batch_sise', '/train_batch_size'),
    ({'train_micro_batch_size_per_gpus': 8}, '/train_micro_batch_size_per_gpus',
     '/train_micro_batch_size_per_gpu'),
    ({'gradient_accumulation_step': 2}, '/gradient_accumulation_step',
     '/gradient_accumulation_steps'),
    ({'Gradient_Clipping': 1.0}, '/Gradient_Clipping', '/gradient_clipping'),
    ({'step_per_print': 10}, '/step_per_print', '/steps_per_print'),
    ({'wall_clock_break_down': True}, '/wall_clock_break_down', '/wall_clock_breakdown'),
    ({'zero_optimisation': {'stage': 3, 'stage3_max_live_parameters': 5}}, '/zero_optimisation',
     '/zero_optimization'),
    ({'zero': {'stage': 3}}, '/zero', 'unknown key'),
    ({'bp16': {'enabled': True}}, '/bp16', '16'),
    ({'tensor_board': {'enabled': True}}, '/tensor_board', '/tensorboard'),
    ({'flop_profiler': {'enabled': True}}, '/flop_profiler', '/flops_profiler'),
    ({'activation_checkpoint': {'profile': True}}, '/activation_checkpoint',
     '/activation_checkpointing'),
    ({'comm_logger': {'enabled': True}}, '/comm_logger', '/comms_logger'),
    ({'learning_rate': 1e-3}, '/learning_rate', 'unknown key'),
    ({'stage': 2}, '/stage', '/zero_optimization/stage'),
    ({'overlap_comm': True}, '/overlap_comm', '/zero_optimization/overlap_comm'),
    ({'loss_scale': 128}, '/loss_scale', '/fp16/loss_scale'),
    ({'offload_optimizer': CPU}, '/offload_optimizer', '/zero_optimization/offload_optimizer'),
    ({'zero_optimization': {'stge': 3, 'stage3_max_live_parameters': 5}}, '/zero_optimization/stge',
     '/zero_optimization/stage'),
    (zero(2, reduce_bucket_sise=5e7), '/zero_optimization/reduce_bucket_sise',
     '/zero_optimization/reduce_bucket_size'),
    (zero(3, stage3_prefetch_bucket_sizes=5), '/zero_optimization/stage3_prefetch_bucket_sizes',
     '/zero_optimization/stage3_prefetch_bucket_size'),
    (zero(2, gradient_clipping=1.0), '/zero_optimization/gradient_clipping', '/gradient_clipping'),
    (zero(3, offload_params=CPU), '/zero_optimization/offload_params',
     '/zero_optimization/offload_param'),
    ({**zero(3, offload_optimizer={**CPU, 'pin_memry': True}), **UNFORCED},
     '/zero_optimization/offload_optimizer/pin_memry',
     '/zero_optimization/offload_optimizer/pin_memory'),
    (zero(3, offload_param={**CPU, 'buffer_cnt': 5}), '/zero_optimization/offload_param/buffer_cnt',
     '/zero_optimization/offload_param/buffer_count'),
    (zero(3, leaf_module={'class': ['A']}), '/zero_optimization/leaf_module/class',
     '/zero_optimization/leaf_module/classes'),
    ({'fp16': {'enabled': True, 'loss_scale_windows': 500}}, '/fp16/loss_scale_windows',
     '/fp16/loss_scale_window'),
    ({'bf16': {'enable': True}}, '/bf16/enable', '/bf16/enabled'),
    ({'torch_autocast': {'enabled': True, 'dtyp': 'bfloat16'}}, '/torch_autocast/dtyp',
     '/torch_autocast/dtype'),
    ({'tensorboard': {'enabled': True, 'outputpath': 'tb'}}, '/tensorboard/outputpath',
     '/tensorboard/output_path'),
    ({'wandb': {'projekt': 'x'}}, '/wandb/projekt', '/wandb/project'),
    ({'csv_monitor': {'jobname': 'x'}}, '/csv_monitor/jobname', '/csv_monitor/job_name'),
    ({'flops_profiler': {'profile_steps': 5}}, '/flops_profiler/profile_steps',
     '/flops_profiler/profile_step'),
    ({'activation_checkpointing': {'partitioned_activations': True}},
     '/activation_checkpointing/partitioned_activations',
     '/activation_checkpointing/partition_activations'),
    ({'aio': {'blocksize': 1048576}}, '/aio/blocksize', '/aio/block_size'),
    ({'checkpoint': {'use_node_local_store': True}}, '/checkpoint/use_node_local_store',
     '/checkpoint/use_node_local_storage'),
    ({'checkpoint': {'writer': {'io_buffer': 1}}}, '/checkpoint/writer/io_buffer',
     '/checkpoint/writer/io_buffer_size'),
    ({'data_types': {'grad_accum_dtypes': 'fp32'}}, '/data_types/grad_accum_dtypes',
     '/data_types/grad_accum_dtype'),
    ({'timers': {'throughput': {'enable': False}}}, '/timers/throughput/enable',
     '/timers/throughput/enabled'),
    ({'compile': {'deep_compile': False}}, '/compile/deep_compile', '/compile/deepcompile'),
    ({'data_efficiency': {'data_sampling': {'num_worker': 2}}},
     '/data_efficiency/data_sampling/num_worker', '/data_efficiency/data_sampling/num_workers'),
    ({'tensor_parallel': {'tp': {'tp_sizes': 1}}}, '/tensor_parallel/tp/tp_sizes',
     '/tensor_parallel/tp/tp_size'),
    ({'autotuning': {'model_info': {'num_layer': 3}}}, '/autotuning/model_info/num_layer',
     '/autotuning/model_info/num_layers'),
]  # fmt: skip

# A value of the wrong type, or out of bounds.
TYPES: list[tuple[dict[str, Any], str, str]] = [
    ({'train_batch_size': '256'}, '/train_batch_size', 'takes a whole number (without the quot'),
    ({'train_micro_batch_size_per_gpu': 2.5}, '/train_micro_batch_size_per_gpu',
     'is 2.5; it takes a whole number'),
    ({'train_micro_batch_size_per_gpu': 0}, '/train_micro_batch_size_per_gpu', 'more than 0'),
    ({'gradient_accumulation_steps': -1}, '/gradient_accumulation_steps', 'more than 0'),
    ({'gradient_accumulation_steps': True}, '/gradient_accumulation_steps',
     'is true; it takes a whole number'),
    ({'gradient_clipping': '1.0'}, '/gradient_clipping', 'TRAIN.CLIP_GRAD'),
    ({'gradient_clipping': -1}, '/gradient_clipping', 'at least 0'),
    ({'gradient_clipping': float('nan')}, '/gradient_clipping', 'no finite number'),
    ({'steps_per_print': 'often'}, '/steps_per_print', 'takes a whole number or null'),
    ({'wall_clock_breakdown': 'true'}, '/wall_clock_breakdown', 'true or false (without the quot'),
    ({'dump_state': 1}, '/dump_state', 'is 1; it takes true or false'),
    ({'zero_optimization': 2}, '/zero_optimization', 'is 2; it takes an object'),
    ({'zero_optimization': True}, '/zero_optimization', 'is true; it takes an object'),
    ({'zero_optimization': [2]}, '/zero_optimization', 'takes an object'),
    ({'fp16': True}, '/fp16', 'is true; it takes an object'),
    ({'bf16': 'auto'}, '/bf16', 'takes an object'),
    (zero(4, stage3_max_live_parameters=5), '/zero_optimization/stage', 'is 4; it takes 0, 1, 2'),
    (zero('3', offload_param=CPU), '/zero_optimization/stage', '(without the quotation marks)'),
    (zero(True), '/zero_optimization/stage', 'is true'),
    (zero(2, reduce_bucket_size=-5), '/zero_optimization/reduce_bucket_size', 'more than 0'),
    (zero(2, allgather_bucket_size='5e8'), '/zero_optimization/allgather_bucket_size',
     'takes a whole number'),
    (zero(2, reduce_bucket_size=0.5), '/zero_optimization/reduce_bucket_size', 'whole number'),
    (zero(2, overlap_comm='yes'), '/zero_optimization/overlap_comm', 'is "yes"'),
    (zero(2, contiguous_gradients=1), '/zero_optimization/contiguous_gradients', 'true or false'),
    (zero(3, offload_param='cpu'), '/zero_optimization/offload_param', 'takes an object'),
    (zero(3, offload_param={'device': 'gpu'}), '/zero_optimization/offload_param/device',
     'is "gpu"; it takes "none", "cpu", "nvme"'),
    (zero(3, offload_param={'device': 'CPU'}), '/zero_optimization/offload_param/device',
     "'cpu' is the nearest"),
    ({**zero(3, offload_optimizer={**CPU, 'ratio': 1.5}), **UNFORCED},
     '/zero_optimization/offload_optimizer/ratio', 'at most 1'),
    (zero(3, zenflow={'topk_ratio': 0}), '/zero_optimization/zenflow/topk_ratio', 'more than 0'),
    (zero(3, stage3_max_live_parameters=[5]), '/zero_optimization/stage3_max_live_parameters',
     'is [5]; it takes a whole number'),
    ({'fp16': {'enabled': 'true'}}, '/fp16/enabled', 'takes true or false'),
    ({'fp16': {'enabled': True, 'loss_scale': -1}}, '/fp16/loss_scale', 'at least 0'),
    ({'fp16': {'enabled': True, 'loss_scale_window': 0}}, '/fp16/loss_scale_window', 'more than 0'),
    ({'fp16': {'enabled': True, 'initial_scale_power': '16'}}, '/fp16/initial_scale_power',
     'whole number'),
    ({'bf16': {'enabled': 1}}, '/bf16/enabled', 'AMP_OPT_LEVEL'),
    ({'torch_autocast': {'enabled': True, 'dtype': 'fp8'}}, '/torch_autocast/dtype', 'bfloat16'),
    ({'torch_autocast': {'enabled': True, 'lower_precision_safe_modules': [1]}},
     '/torch_autocast/lower_precision_safe_modules', 'has entry 0, which is 1; it takes a text'),
    ({'communication_data_type': 'fp8'}, '/communication_data_type', "['fp16', 'bf16', 'fp32']"),
    ({'gradient_allreduce_op': 'max'}, '/gradient_allreduce_op', 'mean'),
    ({'data_types': {'grad_accum_dtype': 'tf32'}}, '/data_types/grad_accum_dtype', '"fp32"'),
    ({'data_types': {'keep_in_fp32_modules': 'norm'}}, '/data_types/keep_in_fp32_modules',
     'a list of name'),
    ({'checkpoint': {'tag_validation': 'Never'}}, '/checkpoint/tag_validation', 'WARN'),
    ({'comms_logger': {'enabled': True, 'prof_ops': 'all_reduce'}}, '/comms_logger/prof_ops',
     'takes a list'),
    ({'tensorboard': {'enabled': 'yes'}}, '/tensorboard/enabled', 'takes true or false'),
    ({'flops_profiler': {'profile_step': 0}}, '/flops_profiler/profile_step', 'more than 0'),
    ({'compile': {'passes': ['z2']}}, '/compile/passes', '"z1"'),
    ({'hybrid_engine': {'max_out_tokens': 0}}, '/hybrid_engine/max_out_tokens', 'more than 0'),
]  # fmt: skip

# What contradicts itself or the yacs configuration: and that, and keyword arguments of `check`.
CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, str], dict[str, bool], str, str]] = [
    ({'train_batch_size': 100}, {}, {}, '/train_batch_size', '128 images a micro-batch x 1'),
    ({'train_batch_size': 64, 'train_micro_batch_size_per_gpu': 8,
      'gradient_accumulation_steps': 2}, {}, {}, '/train_batch_size', '= 32'),
    ({'train_micro_batch_size_per_gpu': 8, 'train_batch_size': 16}, {'DATA.BATCH_SIZE': '4'}, {},
     '/train_micro_batch_size_per_gpu', 'DATA.BATCH_SIZE is 4'),
    ({'gradient_accumulation_steps': 2}, {'TRAIN.ACCUMULATION_STEPS': '4'}, {},
     '/gradient_accumulation_steps', 'TRAIN.ACCUMULATION_STEPS is 4'),
    ({'gradient_clipping': 2.0}, {'TRAIN.CLIP_GRAD': '1.0'}, {}, '/gradient_clipping',
     'TRAIN.CLIP_GRAD is 1.0'),
    (adamw(max_grad_norm=1.0), {}, IN_JSON, '/optimizer/params/max_grad_norm',
     '/gradient_clipping'),
    ({'fp16': {'enabled': True}, 'bf16': {'enabled': True}}, {}, {}, '/bf16', '/fp16 and /bf16'),
    ({'torch_autocast': {'enabled': True}, 'bf16': {'enabled': True}}, {}, {}, '/torch_autocast',
     'enabled together'),
    ({'bf16': {'enabled': True}}, {'AMP_OPT_LEVEL': 'O0'}, {}, '/bf16/enabled', "'O0' with"),
    ({'fp16': {'enabled': True}}, BF16, {}, '/fp16/enabled', 'AMP_TYPE bfloat16'),
    ({'bf16': {'enabled': False}}, BF16, {}, '/bf16/enabled', '/bf16/enabled is false'),
    ({'torch_autocast': {'enabled': True, 'dtype': 'float16'}},
     {'AMP_OPT_LEVEL': 'O1', 'AMP_TYPE': 'bfloat16'}, {}, '/torch_autocast/enabled', 'AMP_TYPE'),
    ({'bfloat16': {'enabled': True}}, {}, {}, '/bfloat16', 'old name of /bf16'),
    ({'data_types': {'param_dtype': 'fp16'}}, BF16, {}, '/data_types/param_dtype', 'in bf16'),
    ({}, {'AMP_OPT_LEVEL': 'O3'}, {}, '', "AMP_OPT_LEVEL is 'O3'"),
    ({}, {'AMP_TYPE': 'fp8'}, {}, '', "AMP_TYPE is 'fp8'"),
    # ZeRO: what the stage does not have
    (zero(1, stage3_max_live_parameters=5), {}, {},
     '/zero_optimization/stage3_max_live_parameters', 'stage is 1'),
    (zero(2, stage3_gather_16bit_weights_on_model_save=True), {}, {},
     '/zero_optimization/stage3_gather_16bit_weights_on_model_save', 'stage 3'),
    (zero(2, param_persistence_threshold=0), {}, {},
     '/zero_optimization/param_persistence_threshold', 'stage 3'),
    ({'zero_optimization': {'stage3_param_persistence_threshold': 0}}, {}, {},
     '/zero_optimization/stage3_param_persistence_threshold', 'stage is 0'),
    (zero(2, zero_hpz_partition_size=2), {}, {}, '/zero_optimization/zero_hpz_partition_size',
     'stage 3'),
    (zero(2, sub_group_size=1000), {}, {}, '/zero_optimization/sub_group_size', 'stage 3'),
    (zero(1, legacy_stage1=True), {}, {}, '/zero_optimization/legacy_stage1', 'removed'),
    (zero(2, offload_param=CPU), {}, {}, '/zero_optimization/offload_param', 'needs ZeRO stage 3'),
    (zero(0, offload_optimizer=CPU), {}, {}, '/zero_optimization/offload_optimizer',
     'needs ZeRO stage 1, 2 or 3'),
    ({**zero(3, offload_optimizer={'device': 'nvme'}), **UNFORCED}, {}, {},
     '/zero_optimization/offload_optimizer/device', 'goes on from a checkpoint of that with other'),
    ({**zero(3, offload_param={'device': 'nvme'}), **UNFORCED}, {}, {},
     '/zero_optimization/offload_param/device', 'set "cpu"'),
    ({**zero(2, offload_optimizer={**CPU, 'ratio': 0.5}), **UNFORCED}, {}, {},
     '/zero_optimization/offload_optimizer/ratio', 'needs ZeRO stage 3'),
    ({**zero(3, offload_optimizer={**CPU, 'ratio': 0.5}), **UNFORCED}, {}, {},
     '/zero_optimization/offload_optimizer/ratio', 'DeepSpeedCPUAdam'),
    (zero(2, offload_optimizer=CPU), {}, {}, '/zero_optimization/offload_optimizer',
     '/zero_force_ds_cpu_optimizer to false'),
    ({**zero(2), 'gradient_predivide_factor': 2.0}, {}, {}, '/gradient_predivide_factor',
     'reduce_scatter'),
    ({**zero(2), 'prescale_gradients': True}, {}, {}, '/prescale_gradients', 'reduce_scatter'),
    ({**zero(3), 'gradient_allreduce_op': 'sum'}, {}, {}, '/gradient_allreduce_op',
     'their sum is of another loss'),
    # optimizers and schedulers
    (adamw(), {}, {}, '/optimizer', '/optimizer section and an optimizer was passed'),
    (warmup(), {}, {**IN_JSON, 'scheduler_in_code': True}, '/scheduler', 'a scheduler was passed'),
    ({'scheduler': {'type': 'WarmupLR'}}, {}, IN_JSON, '/scheduler', 'needs an optimizer'),
    ({'optimizer': {'type': 'AdmaW'}}, {}, IN_JSON, '/optimizer/type', 'nearest is AdamW'),
    ({'optimizer': {'type': 'sgd'}}, {}, IN_JSON, '/optimizer/type', 'nearest is SGD'),
    ({'optimizer': {'params': {'lr': 0.1}}}, {}, IN_JSON, '/optimizer/type', 'is missing'),
    ({'optimizer': {'type': 7}}, {}, IN_JSON, '/optimizer/type', 'takes a text'),
    (adamw(weight_deacy=0.1), {}, IN_JSON, '/optimizer/params/weight_deacy', 'weight_decay'),
    (adamw(betas=0.9), {}, IN_JSON, '/optimizer/params/betas', 'takes a list'),
    (adamw(eps='1e-8'), {}, IN_JSON, '/optimizer/params/eps', 'without the quotation marks'),
    (adamw(momentum=0.9), {}, IN_JSON, '/optimizer/params/momentum', 'reads no such key'),
    ({'optimizer': {'type': 'SGD', 'params': {'lr': 0.1, 'betas': [0.9, 0.9]}}}, {}, IN_JSON,
     '/optimizer/params/betas', 'unknown key'),
    ({**adamw(), 'scheduler': {'type': 'WarmupCosLR', 'params': {}}}, {}, IN_JSON,
     '/scheduler/type', 'nearest is WarmupCosineLR'),
    (warmup(warmup_num_step=5), {}, IN_JSON, '/scheduler/params/warmup_num_step',
     '/scheduler/params/warmup_num_steps'),
    (warmup(warmup_num_steps='5'), {}, IN_JSON, '/scheduler/params/warmup_num_steps',
     'takes a whole number'),
    ({**adamw(), 'scheduler': {'type': 'WarmupDecayLR', 'params': {}}}, {}, IN_JSON,
     '/scheduler/params/total_num_steps', 'is missing'),
    # 'auto' where it means nothing
    ({'steps_per_print': 'auto'}, {}, {}, '/steps_per_print', "'auto' has no counterpart"),
    (zero(2, overlap_comm='auto'), {}, {}, '/zero_optimization/overlap_comm',
     "'auto' has no counterpart"),
    # what the bridge cannot mend
    ({'managed_gradient_accumulation': False}, {}, {}, '/managed_gradient_accumulation',
     'remove the key'),
    ({'bf16': {'enabled': True, 'check_grad_overflow': False}}, {}, {},
     '/bf16/check_grad_overflow', 'not finite'),
    ({'bf16': {'check_grad_overflow': False}}, BF16, {}, '/bf16/enabled', 'AMP_OPT_LEVEL'),
    (zero(1, compute_grad_norm=False), {}, {}, '/zero_optimization/compute_grad_norm', 'norm'),
    (zero(3, compute_grad_norm=False), {}, {}, '/zero_optimization/compute_grad_norm', 'norm'),
    ({**zero(0), 'data_types': {'grad_accum_dtype': 'fp32'}}, BF16, {},
     '/data_types/grad_accum_dtype', 'at ZeRO stage 0'),
    ({**zero(1), 'data_types': {'grad_accum_dtype': 'fp32'}}, BF16, {},
     '/data_types/grad_accum_dtype', 'at ZeRO stage 1'),
    ({**zero(0), 'data_types': {'grad_accum_dtype': 'fp32'}}, FP16, {},
     '/data_types/grad_accum_dtype', 'with fp16'),
    (adamw(), BF16, IN_JSON, '/optimizer', 'with bf16 at ZeRO stage 0'),
    # what this version of DeepSpeed knows only to refuse it
    (zero(3, mics_shard_size=2), {}, {}, '/zero_optimization/mics_shard_size', 'removed'),
    (zero(3, zeropp_loco_param={}), {}, {}, '/zero_optimization/zeropp_loco_param', 'removed'),
    ({'amp': {'enabled': True}}, {}, {}, '/amp', 'torch_autocast'),
    ({'elasticity': {'enabled': True}}, {}, {}, '/elasticity', 'removed'),
    ({'curriculum_learning': {'enabled': True}}, {}, {}, '/curriculum_learning',
     'data_efficiency.data_sampling.curriculum_learning'),
]  # fmt: skip

DEPRECATED: list[tuple[dict[str, Any], str, str]] = [
    (zero(2, cpu_offload=False), '/zero_optimization/cpu_offload', 'use offload_optimizer'),
    (zero(3, cpu_offload_param=True), '/zero_optimization/cpu_offload_param', 'use offload_param'),
    (zero(2, cpu_offload_use_pin_memory=True), '/zero_optimization/cpu_offload_use_pin_memory',
     'offload_param or offload_optimizer'),
    (zero(3, stage3_gather_fp16_weights_on_model_save=True),
     '/zero_optimization/stage3_gather_fp16_weights_on_model_save',
     'use stage3_gather_16bit_weights_on_model_save'),
]  # fmt: skip

TEMPLATE = {
    'train_batch_size': 'auto',
    'train_micro_batch_size_per_gpu': 'auto',
    'gradient_accumulation_steps': 'auto',
    'gradient_clipping': 'auto',
}
# Right ones, as DeepSpeed's documentation and its users write them.
RIGHT: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, bool]]] = {
    'nothing': ({}, {}, {}),
    'all auto': (TEMPLATE, {}, {}),
    'a triple that agrees': (
        {'train_batch_size': 64, 'train_micro_batch_size_per_gpu': 8,
         'gradient_accumulation_steps': 4}, {}, {}),
    'a batch that yacs and the ranks make': ({'train_batch_size': 256}, {}, {}),
    'the same in both files': (
        {'train_micro_batch_size_per_gpu': 4, 'gradient_clipping': 1},
        {'DATA.BATCH_SIZE': '4', 'TRAIN.CLIP_GRAD': '1.0'}, {}),
    'no clipping': ({'gradient_clipping': 0}, {}, {}),
    'fp16, dynamic scale': (
        {'fp16': {'enabled': True, 'loss_scale': 0, 'loss_scale_window': 1000,
                  'initial_scale_power': 16, 'hysteresis': 2, 'consecutive_hysteresis': False,
                  'min_loss_scale': 1}}, {}, {}),
    'fp16, static scale': ({'fp16': {'enabled': True, 'loss_scale': 128.0}}, FP16, {}),
    'fp16, all left open': (
        {'fp16': {'enabled': 'auto', 'loss_scale': 'auto', 'loss_scale_window': 'auto',
                  'initial_scale_power': 'auto', 'hysteresis': 'auto',
                  'min_loss_scale': 'auto'}}, FP16, {}),
    'bf16': ({'bf16': {'enabled': True}, **zero(1)}, {}, {}),
    'bf16 and fp16, both open': (
        {'bf16': {'enabled': 'auto'}, 'fp16': {'enabled': 'auto'}}, BF16, {}),
    'bf16 on, fp16 off': ({'bf16': {'enabled': True}, 'fp16': {'enabled': False}}, BF16, {}),
    'bf16, accumulated in fp32 at stage 2': (
        {**zero(2), 'data_types': {'grad_accum_dtype': 'fp32'}}, BF16, {}),
    'bf16, accumulated in bf16': (
        {**zero(1), 'data_types': {'grad_accum_dtype': 'bf16', 'param_dtype': 'bf16'}}, BF16, {}),
    'torch autocast': (
        {'torch_autocast': {'enabled': True, 'dtype': 'bfloat16', 'lower_precision_safe_modules':
                            ['torch.nn.Linear', 'torch.nn.Conv2d']}, **zero(3)}, {}, {}),
    'stage 1, buckets in scientific notation': (
        zero(1, reduce_bucket_size=5e8, allgather_bucket_size=2e8), {}, {}),
    'stage 2': (
        zero(2, allgather_partitions=True, allgather_bucket_size=5e8, overlap_comm=True,
             reduce_scatter=True, reduce_bucket_size=5e8, contiguous_gradients=True,
             round_robin_gradients=True), {}, {}),
    'stage 2, options of stage 3 that change nothing': (
        zero(2, stage3_gather_16bit_weights_on_model_save=False, memory_efficient_linear=True,
             offload_param={'device': 'none'}), {}, {}),
    'stage 2, offload': (
        {**zero(2, offload_optimizer={**CPU, 'pin_memory': True}), **UNFORCED}, {}, {}),
    "stage 2, offload of DeepSpeed's own": (
        zero(2, offload_optimizer=CPU), {}, {'cpu_optimizer': True}),
    'stage 2, offload of an optimizer of the JSON': (
        {**zero(2, offload_optimizer=CPU), **adamw(fp32_optimizer_states=True)}, {}, IN_JSON),
    'stage 3': (
        zero(3, contiguous_gradients=True, stage3_max_live_parameters=1e9,
             stage3_max_reuse_distance=1e9, stage3_prefetch_bucket_size=1e7,
             stage3_param_persistence_threshold=1e5, reduce_bucket_size=1e7, sub_group_size=1e9,
             stage3_gather_16bit_weights_on_model_save=True), {}, {}),
    'stage 3, fields by their other names': (
        zero(3, prefetch_bucket_size=10, param_persistence_threshold=0), {}, {}),
    'stage 3, partial offload': (
        zero(3, offload_optimizer={**CPU, 'ratio': 0.3}), {}, {'cpu_optimizer': True}),
    'stage 3, ZeRO++': (
        zero(3, zero_hpz_partition_size=2), {}, {}),
    'stage 3, leaf modules': (
        zero(3, leaf_module={'classes': ['MixtralSparseMoeBlock'], 'names': 'gate'}), {}, {}),
    'monitors': (
        {'tensorboard': {'enabled': True, 'output_path': 'output/ds_logs/', 'job_name': 'train'},
         'wandb': {'enabled': False, 'group': 'g', 'team': 't', 'project': 'p'},
         'csv_monitor': {'enabled': True, 'output_path': 'output/ds_logs/', 'job_name': 'train'},
         'comet': {'enabled': False, 'project': 'p', 'online': True}}, {}, {}),
    'profilers and logs': (
        {'flops_profiler': {'enabled': True, 'profile_step': 1, 'module_depth': -1,
                            'top_modules': 3, 'detailed': True, 'output_file': None},
         'comms_logger': {'enabled': True, 'verbose': False, 'prof_all': False, 'debug': False,
                          'prof_ops': ['all_reduce', 'all_gather']},
         'wall_clock_breakdown': False, 'memory_breakdown': True, 'dump_state': True,
         'steps_per_print': 10, 'timers': {'throughput': {'enabled': True, 'synchronized': False}}},
        {}, {}),
    'activation checkpointing': (
        {'activation_checkpointing': {
            'partition_activations': False, 'cpu_checkpointing': False, 'number_checkpoints': None,
            'contiguous_memory_optimization': False, 'synchronize_checkpoint_boundary': False,
            'profile': False}}, {}, {}),
    'checkpoints': (
        {'checkpoint': {'tag_validation': 'Warn', 'load_universal': False,
                        'use_node_local_storage': False,
                        'parallel_write': {'pipeline_stage': False}}}, {}, {}),
    'an optimizer and a scheduler in the JSON': (
        {**zero(1), **warmup(warmup_min_lr=0, warmup_max_lr=0.001, warmup_num_steps=1000,
                             warmup_type='linear')}, {}, IN_JSON),
    'a scheduler in the JSON alone': (
        {'scheduler': {'type': 'OneCycle', 'params': {
            'cycle_first_step_size': 1000, 'cycle_min_lr': 1e-4, 'cycle_max_lr': 1e-3,
            'decay_step_size': 1000, 'cycle_momentum': False}}}, {}, {}),
    "torch's schedulers": (
        {**adamw(), 'scheduler': {'type': 'StepLR', 'params': {'step_size': 30}}}, {}, IN_JSON),
    'betas, torch_adam and amsgrad': (
        adamw(betas=[0.9, 0.95], eps=1e-8, weight_decay=0, torch_adam=True, amsgrad=True,
              foreach=False), {}, IN_JSON),
    'Adam without decoupled decay': (
        {'optimizer': {'type': 'adam', 'params': {'lr': 1e-3, 'adam_w_mode': False}}}, {}, IN_JSON),
    'Lamb': (
        {'optimizer': {'type': 'Lamb', 'params': {'lr': 1e-3, 'max_coeff': 0.3,
                                                  'min_coeff': 0.01}}}, {}, IN_JSON),
    'Lion': (
        {'optimizer': {'type': 'Lion', 'params': {'lr': 1e-4, 'betas': [0.9, 0.99]}}}, {}, IN_JSON),
    'SGD': (
        {'optimizer': {'type': 'SGD', 'params': {'lr': 0.1, 'momentum': 0.9}}}, {}, IN_JSON),
    'gradients': (
        {**zero(2, reduce_scatter=False), 'gradient_predivide_factor': 2.0,
         'prescale_gradients': False, 'communication_data_type': 'fp32'}, {}, {}),
    'data efficiency, off': (
        {'data_efficiency': {'enabled': False, 'seed': 1234, 'data_routing': {
            'enabled': False, 'random_ltd': {'enabled': False, 'total_layer_num': 24}},
            'data_sampling': {'enabled': True, 'num_epochs': 1, 'num_workers': 0,
                'curriculum_learning': {'enabled': True, 'data_cluster_path': '/x',
                    'curriculum_metrics': {'seqlen': {'index_to_sample_path': '/x',
                        'difficulty_type': 'value', 'schedule_config': {'max_difficulty': 2}}}}}}},
        {}, {}),
    'compile and tensor parallel, off': (
        {'compile': {'deepcompile': False}, 'tensor_parallel': {'autotp_size': 1}}, {}, {}),
    'autotuning': (
        {'autotuning': {'enabled': False, 'fast': True, 'metric': 'throughput', 'arg_mappings': {
            'train_micro_batch_size_per_gpu': '--batch_size'}, 'model_info_path': None,
            'max_train_batch_size': 4096}}, {}, {}),
    'the rest of the top level': (
        {'zero_allow_untested_optimizer': True, 'disable_allgather': False,
         'use_data_before_expert_parallelism': False,
         'seq_parallel_communication_data_type': 'fp32', 'sequence_parallel_size': 1,
         'disable_python_gc': True, 'managed_gradient_accumulation': True,
         'memory_breakdown': False}, {}, {}),
}  # fmt: skip
