"""The unpublished names of DeepSpeed that zero/ uses: the installed version has all of them.

Sources are read, not imported. Where this fails, DeepSpeed has renamed or dropped what is named.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.version import Version

import internvl_ds

PACKAGE = Path(internvl_ds.__file__).parent
DEEPSPEED = Path(importlib.util.find_spec('deepspeed').submodule_search_locations[0])


class Names(NamedTuple):
    """Names of one class of DeepSpeed.

    Attributes:
        module: its file.
        owner: the class; '' for names of the module itself; MARKS, READ.
        where: the module of zero/ that uses them.
        names: of methods, and of attributes that are set.
        since: the first of the versions looked at (0.17.6, 0.18.9, 0.19.0, 0.19.8) that has them
            all. zero/ does without those of later ones in earlier.
        until: the version from which it does without; '' where each later one has them.
    """

    module: str
    owner: str
    where: str
    names: str
    since: str
    until: str = ''


# Owners that are no class: what is set on any object, such as a parameter; what is read of one.
MARKS, READ = 'marks', 'read'
LOOKUPS = ('getattr', 'hasattr', 'setattr', 'delattr', 'replaced')
# Names in the table that others use for things of their own.
SHARED = {'_config', 'destroy', 'step', 'zero_grad', 'clip_grad', 'overflow', 'gradient_clipping'}
TIMM = {'_base_optimizer'}  # of its Lookahead

ENGINE, BASE = 'runtime/engine.py', 'runtime/base_optimizer.py'
UNFUSED, SCALER = 'runtime/fp16/unfused_optimizer.py', 'runtime/fp16/loss_scaler.py'
ONE_TWO, THREE = 'runtime/zero/stage_1_and_2.py', 'runtime/zero/stage3.py'
PARTITION, CONFIG = 'runtime/zero/partition_parameters.py', 'runtime/config.py'

ENGINE_CLASS, STAGE_1_2 = 'DeepSpeedEngine', 'DeepSpeedZeroOptimizer'
STAGE_3 = 'DeepSpeedZeroOptimizer_Stage3'

# A fixed order: the file, the class, where it is used, the names, since when.
TABLE = [
    Names(ENGINE, ENGINE_CLASS, 'wrapper',
          'basic_optimizer param_names _config _copy_recovery_script _get_shared_params '
          'checkpoint_tag_validation_enabled '
          '_get_all_ckpt_names _get_param_fragment_func', '0.17.6'),
    Names(ENGINE, ENGINE_CLASS, 'guards',
          '_backward_prologue _backward_prologue_per_tensor _running_engine_backward '
          '_manual_backward_expected', '0.18.9'),
    Names(ENGINE, ENGINE_CLASS, 'module_state', '_cast_module_mixed_precision', '0.19.8'),
    Names(ENGINE, '', 'guards', '_ENGINE_BACKWARD_GRAPH_TRACKER', '0.19.8'),
    Names(ENGINE, ENGINE_CLASS, 'deepspeed_optimizer', '_get_zero_param_shapes', '0.17.6'),
    Names(ENGINE, ENGINE_CLASS, 'stage_0', 'torch_autocast_z0_gradscaler', '0.18.9'),
    Names(ENGINE, ENGINE_CLASS, 'stage_0', '_do_optimizer_backward', '0.17.6', '0.18'),
    Names(ENGINE, ENGINE_CLASS, 'stage_0', 'clip_fp32_gradients', '0.17.6'),
    Names(ENGINE, READ, 'stage_0', 'overflow', '0.17.6'),
    Names(ENGINE, ENGINE_CLASS, 'passes/unused',
          'allreduce_gradients is_gradient_accumulation_boundary', '0.17.6'),
    Names(CONFIG, 'DeepSpeedConfig', 'wrapper', '_param_dict', '0.17.6'),
    Names(CONFIG, 'DeepSpeedConfig', 'stage_0', 'gradient_clipping', '0.17.6'),
    Names(CONFIG, 'DeepSpeedConfig', 'wrapper', 'float16_config', '0.17.6'),
    Names('utils/torch.py', '', 'guards', 'is_functorch_transforming', '0.19.8'),
    Names(SCALER, '', 'deepspeed_optimizer', 'CreateLossScaler', '0.17.6'),
    Names(SCALER, 'DynamicLossScaler', 'deepspeed_optimizer',
          'cur_scale cur_iter last_overflow_iter cur_hysteresis', '0.17.6'),
    Names(SCALER, 'LossScaleConfig', 'deepspeed_optimizer',
          'cur_scale cur_iter last_overflow_iter', '0.18.9'),
    Names('runtime/bf16_optimizer.py', 'BF16_Optimizer', 'stage_0', 'destroy', '0.17.6'),
    Names(UNFUSED, 'FP16_UnfusedOptimizer', 'stage_0', 'fp16_groups fp32_groups', '0.17.6'),
    Names(UNFUSED, 'FP16_UnfusedOptimizer', 'stage_0', 'loss_scale_config', '0.18.9'),
    *(
        Names(module, owner, 'deepspeed_optimizer',
              'refresh_fp32_params _update_scale clip_grad step', '0.17.6')
        for module, owner in (
            (UNFUSED, 'FP16_UnfusedOptimizer'), (ONE_TWO, STAGE_1_2), (THREE, STAGE_3)
        )
    ),
    *(
        Names(module, owner, 'deepspeed_optimizer',
              'torch_autocast_gradscaler loss_scaler dynamic_loss_scale norm_for_param_grads '
              'zero_grad', '0.17.6')
        for module, owner in ((ONE_TWO, STAGE_1_2), (THREE, STAGE_3))
    ),
    *(
        Names(module, owner, 'deepspeed_optimizer', 'clear_backward_seen_flag', '0.18.9')
        for module, owner in ((ONE_TWO, STAGE_1_2), (THREE, STAGE_3))
    ),
    Names(ONE_TWO, STAGE_1_2, 'stage_1_2',
          'single_partition_of_fp32_groups partition_size bit16_groups update_lp_params '
          '_get_groups_without_padding params_in_partition cpu_offload offload_gradient_dict '
          'averaged_gradients all_grad_tensors accumulated_grads_in_cpu get_param_id overlap_comm '
          'ipg_buckets params_already_reduced get_gradient_for_reduction reduce_gradients '
          'reduce_ready_partitions_and_remove_grads reduce_bucket_size has_overflow '
          'get_all_grad_tensors get_flat_partition', '0.17.6'),
    Names(ONE_TWO, STAGE_1_2, 'stage_1_2',
          'round_robin_bit16_padding _offload_accumulated_param_ids '
          '_finalize_cpu_offload_gradient_accumulation', '0.19.8'),
    Names(ONE_TWO, MARKS, 'stage_1_2', '_zero_padding', '0.19.8'),
    Names(ONE_TWO, STAGE_1_2, 'deepspeed_optimizer', 'check_grad_overflow', '0.17.6'),
    Names('runtime/utils.py', '', 'deepspeed_optimizer', 'is_invalid_grad_norm', '0.19.8'),
    Names(THREE, STAGE_3, 'stage_3',
          '_overflow_check_and_loss_scale_update check_overflow', '0.17.6'),
    Names(BASE, MARKS, 'stage_3', '_epilogue_ran_this_backward', '0.18.9'),
    Names(THREE, STAGE_3, 'stage_3',
          'parameter_offload fp32_partitioned_groups_flat fp16_partitioned_groups_flat fp16_groups '
          'checkpoint_event_prologue checkpoint_event_epilogue _unflatten_partitioned_parameters '
          'invalidate_secondary_tensor sub_group_to_group_id micro_step_id offload_optimizer '
          'get_local_fp32_grad_for_param grad_partitions_flat_buffer grad_position '
          'get_param_id', '0.17.6'),
    Names(THREE, STAGE_3, 'stage_3',
          '_offload_boundary_param_ids _finalize_offload_gradient_accumulation', '0.19.8'),
    Names('runtime/zero/parameter_offload.py', 'DeepSpeedZeRoOffload', 'stage_3',
          'partition_all_parameters persistent_parameters __allgather_stream', '0.17.6'),
    Names(PARTITION, '', 'stage_3', 'get_allgather_dtype ZeroParamStatus', '0.17.6'),
    Names(PARTITION, 'ZeroParamStatus', 'stage_3', 'AVAILABLE NOT_AVAILABLE', '0.17.6'),
    Names(PARTITION, MARKS, 'stage_3', 'ds_quant_scale all_gather all_gather_coalesced', '0.17.6'),
    Names(PARTITION, MARKS, 'parameters',
          'ds_id ds_shape ds_numel ds_tensor ds_status ds_process_group ds_secondary_tensor '
          'convert_to_zero_parameters', '0.17.6'),
    Names(PARTITION, MARKS, 'sharded_build',
          'ds_tensor ds_shape ds_status ds_process_group', '0.17.6'),
    Names(PARTITION, 'Init', 'parameters', '_allgather_params_coalesced', '0.17.6'),
    Names(PARTITION, 'Init', 'sharded_build',
          '_convert_to_deepspeed_param local_device remote_device', '0.17.6'),
    Names(PARTITION, 'InsertPostInitMethodToModuleSubClasses', 'sharded_build',
          'mem_efficient_linear', '0.17.6'),
    Names(PARTITION, 'InsertPostInitMethodToModuleSubClasses', 'sharded_build',
          '_enable_mem_efficient_linear', '0.19.8'),
    Names('utils/mixed_precision_linkage.py', MARKS, 'parameters', '_hp_mapping', '0.17.6'),
]  # fmt: skip

# What DeepSpeed's documentation has of its engine, and what torch has of any optimizer.
PUBLISHED = {
    'module', 'optimizer', 'backward', 'device', 'global_steps', 'step', 'was_step_applied',
    'loss_scale', 'get_global_grad_norm', 'dynamic_loss_scale', 'initial_dynamic_scale',
    'fp16_enabled', 'bfloat16_enabled',
    'dynamic_loss_scale_args', 'torch_autocast_dtype', 'torch_autocast_enabled', 'param_groups',
    'zero_offload_optimizer', 'zero_offload_param', 'zero_optimization_stage', '__deepcopy__',
    'register_step_post_hook', 'register_forward_pre_hook', 'register_forward_hook',
    'register_state_dict_pre_hook', '__class__',
    '_step_supports_amp_scaling', '_ddp_params_and_buffers_to_ignore',
    '_replicate_for_data_parallel',
}  # fmt: skip


@pytest.mark.parametrize('row', TABLE, ids=lambda row: f'{row.owner or row.module}-{row.where}')
def test_the_installed_deepspeed_has(row):
    """An earlier version is asked for what it had; zero/ does without the rest there."""
    installed = Version(metadata.version('deepspeed'))
    if Version(row.since) > installed or (row.until and installed >= Version(row.until)):
        return
    missing = set(row.names.split()) - names_of(DEEPSPEED, row.module, row.owner)
    assert not missing, f'deepspeed/{row.module} has no {missing}: see zero/{row.where}.py'


def test_a_version_that_lacks_a_name_is_found(tmp_path):
    (tmp_path / 'x.py').write_text('class A:\n    def f(self):\n        self.has = 1\n')
    assert names_of(tmp_path, 'x.py', 'A') == {'f', 'has'}


def test_the_table_has_every_name_that_zero_uses():
    listed = {(row.where, name) for row in TABLE for name in row.names.split()}
    named = {name for _, name in listed}
    for path in sorted((PACKAGE / 'zero').rglob('*.py')):
        for owner, name in attributes(ast.parse(path.read_text())):
            unpublished = owner in ('engine', 'optimizer', '_config') and name not in PUBLISHED
            marks = name.startswith('ds_') and name != 'ds_config'
            assert not (unpublished or marks) or name in named, (path.name, owner, name)
    for where, name in listed:
        assert re.search(rf'\b{name}\b', (PACKAGE / f'zero/{where}.py').read_text()), (where, name)


def test_no_other_room_knows_them():
    assert known_elsewhere(PACKAGE) == []


def known_elsewhere(package: Path) -> list[str]:
    """Where modules outside zero/ use what DeepSpeed has not published."""
    named = {name for row in TABLE for name in row.names.split()} - SHARED
    found = []
    for path in sorted(package.rglob('*.py')):
        room = path.relative_to(package).parts[0]
        if room != 'zero':
            for owner, name in attributes(ast.parse(path.read_text())):
                private = owner in ('engine', 'optimizer') and re.match('_[^_]', name)
                if (private and name not in TIMM) or name in named:
                    found.append(f'{path.relative_to(package)}: {owner}.{name}')
    return found


def attributes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(last word before the dot, attribute), also of getattr, hasattr, setattr and `replaced`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield last_word(node.value), node.attr
        elif isinstance(node, ast.Call) and last_word(node.func) in LOOKUPS:
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant):
                yield last_word(owner), name.value


def last_word(node: ast.AST) -> str:
    return getattr(node, 'attr', getattr(node, 'id', ''))


@functools.cache
def parsed(root: Path, module: str) -> ast.Module:
    return ast.parse((root / module).read_text())


def names_of(root: Path, module: str, owner: str) -> set[str]:
    """What a class defines, or sets of itself; see `Names.owner` for others."""
    tree = parsed(root, module)
    if owner == MARKS:
        return {*set_attributes(tree), *(n.name for n in ast.walk(tree) if hasattr(n, 'name'))}
    if owner == READ:
        return {name for _, name in attributes(tree)}
    if not owner:
        return defined_in(tree)
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    names, bases = set(), [owner]
    while bases:
        found = classes.get(bases.pop())
        if found is not None:
            names |= defined_in(found) | set(set_attributes(found, 'self'))
            bases += [base.id for base in found.bases if isinstance(base, ast.Name)]
    return names


def defined_in(node: ast.Module | ast.ClassDef) -> set[str]:
    names = {n.name for n in node.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assigned = [n for n in node.body if isinstance(n, ast.Assign | ast.AnnAssign)]
    targets = [t for n in assigned for t in getattr(n, 'targets', [getattr(n, 'target', None)])]
    return names | {t.id for t in targets if isinstance(t, ast.Name)}


def set_attributes(tree: ast.AST, of: str | None = None) -> Iterator[str]:
    """The attributes that code sets, of the variable ``of`` or of any."""
    for node in ast.walk(tree):
        is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if is_set and of in (None, getattr(node.value, 'id', '')):
            yield node.attr
