"""Every key of a ds_config has a fate, and what is refused or unused says so."""

from __future__ import annotations

from typing import Any

import pytest

from internvl_ds.config.ds.check import check
from internvl_ds.config.ds.diagnostics import ERROR, WARNING, pointer_of
from internvl_ds.config.ds.fates import FATES, REFUSED, RIGHT, UNUSED, fate_of
from internvl_ds.config.ds.schema import find, installed, walk
from internvl_ds.config.tree import nest
from internvl_ds.tools.cli import main
from tests.harness.ds_tables import zero
from tests.harness.model import OLD_DEEPSPEED, make_config
from tests.harness.ranks import ROOT

ON = {'enabled': True}
CPU = {'device': 'cpu', 'pin_memory': False}
# A ds_config that meets each fate but RIGHT.
MET: dict[str, dict[str, Any]] = {
    '/activation_checkpointing': {'activation_checkpointing': {'cpu_checkpointing': True}},
    '/aio': {'aio': {'block_size': 262144}},
    '/autotuning/enabled': {'autotuning': ON},
    '/bf16/bf16_master_weights_and_grads': {
        **zero(1), 'bf16': {**ON, 'bf16_master_weights_and_grads': True}},
    '/bf16/bf16_optimizer_states': {**zero(1), 'bf16': {**ON, 'bf16_optimizer_states': True}},
    '/bfloat16': {'bfloat16': ON},
    '/checkpoint': {'checkpoint': {'checkpoint_serialization': False}},
    '/checkpoint/load_universal': {'checkpoint': {'load_universal': True}},
    '/checkpoint/use_node_local_storage': {'checkpoint': {'use_node_local_storage': True}},
    '/checkpoint/writer': {'checkpoint': {'writer': {'type': 'FAST', 'decoupled': True}}},
    '/compile': {'compile': {'passes': ['z1']}},
    '/compile/deepcompile': {'compile': {'deepcompile': True}},
    '/data_efficiency/enabled': {'data_efficiency': ON},
    '/data_parallel_size': {'data_parallel_size': 2},
    '/dataloader_drop_last': {'dataloader_drop_last': True},
    '/datastates_ckpt': {'datastates_ckpt': {'host_cache_size': 1}},
    '/disable_allgather': {'disable_allgather': True},
    '/expert_parallel': {'expert_parallel': {**ON, 'autoep_size': 2}},
    '/fp16/fp16_master_weights_and_grads': {
        **zero(2), 'fp16': {**ON, 'fp16_master_weights_and_grads': True}},
    '/gradient_allreduce_op': {'gradient_allreduce_op': 'sum'},
    '/hybrid_engine': {'hybrid_engine': ON},
    '/pipeline': {'pipeline': {'stages': 2}},
    '/seq_parallel_communication_data_type': {'seq_parallel_communication_data_type': 'bf16'},
    '/sequence_parallel_size': {'sequence_parallel_size': 2},
    '/tensor_parallel': {'tensor_parallel': {'tp_overlap_comm': True}},
    '/tensor_parallel/autotp_size': {'tensor_parallel': {'autotp_size': 2}},
    '/tensor_parallel/tp': {'tensor_parallel': {'tp': {'tp_size': 2}}},
    '/use_data_before_expert_parallelism': {'use_data_before_expert_parallelism': True},
    '/vocabulary_size': {'vocabulary_size': 50304},
    '/weight_quantization': {'weight_quantization': {'quantized_initialization': {'num_bits': 8}}},
    '/zero_optimization/elastic_checkpoint': zero(1, elastic_checkpoint=True),
    '/zero_optimization/load_from_fp32_weights': zero(1, load_from_fp32_weights=False),
    '/zero_optimization/offload_optimizer/super_offload': {
        **zero(3, offload_optimizer={**CPU, 'super_offload': True}),
        'zero_force_ds_cpu_optimizer': False},
    '/zero_optimization/zenflow': {
        **zero(2, offload_optimizer=CPU, zenflow={'topk_ratio': 0.05}),
        'zero_force_ds_cpu_optimizer': False},
    '/zero_optimization/zero_quantized_gradients': zero(3, zero_quantized_gradients=True),
    '/zero_optimization/zero_quantized_nontrainable_weights': zero(
        3, zero_quantized_nontrainable_weights=True),
    '/zero_optimization/zero_quantized_weights': zero(3, zero_quantized_weights=True),
    **{
        f'/zero_optimization/{block}/{key}': {
            **zero(3, **{block: {**CPU, key: value}}), 'zero_force_ds_cpu_optimizer': False}
        for block in ('offload_param', 'offload_optimizer')
        for key, value in {
            'nvme_path': '/x', 'buffer_count': 9, 'buffer_size': 9, 'max_in_cpu': 9,
            'pipeline_read': True, 'pipeline_write': True,
        }.items()
    },
    # Which only an earlier DeepSpeed reads.
    **{
        f'/{name}': {name: {'enabled': True}}
        for name in ('amp', 'curriculum_learning', 'nebula', 'progressive_layer_drop')
    },
    '/compression_training': {'compression_training': {'layer_reduction': {'enabled': True}}},
    '/elasticity': {'elasticity': {
        'enabled': True, 'max_train_batch_size': 64, 'micro_batch_sizes': [2, 4]}},
    '/graph_harvesting': {'graph_harvesting': True},
    '/sparse_attention': {'sparse_attention': {'mode': 'fixed', 'block': 8}},
    '/sparse_gradients': {'sparse_gradients': True},
    '/zero_optimization/mics_shard_size': zero(3, mics_shard_size=2),
    '/zero_optimization/mics_hierarchical_params_gather': zero(
        3, mics_hierarchical_params_gather=True),
    '/zero_optimization/zeropp_loco_param': zero(3, zeropp_loco_param={'err_beta': 0.8}),
}  # fmt: skip
# Said of blocks whose other keys mean nothing while they are off, as they are.
NEVER_MET = {'/autotuning', '/data_efficiency'}


def test_every_key_has_a_fate_and_every_fate_a_key():
    pointers = {pointer_of(path) for path, key in walk(installed()) if not key.refused}
    without = [p for p in pointers if fate_of(tuple(p.split('/')[1:]))[1] is None]
    assert without == []
    assert OLD_DEEPSPEED or [p for p in FATES if find(installed(), p.split('/')[1:]) is None] == []
    assert {fate.kind for fate in FATES.values()} == {RIGHT, REFUSED, UNUSED}
    assert all(fate.text for fate in FATES.values() if fate.kind != RIGHT)


@pytest.mark.parametrize('pointer', [p for p, f in FATES.items() if f.kind != RIGHT])
def test_what_is_refused_or_unused_says_so_once(pointer):
    key = find(installed(), pointer.split('/')[1:])
    if pointer in NEVER_MET or key is None:
        return
    (found,) = check(MET[pointer], make_config(AMP_OPT_LEVEL=''), 2)
    severity = ERROR if FATES[pointer].kind == REFUSED else WARNING
    assert (found.pointer, found.severity) == (pointer, severity), str(found)
    assert FATES[pointer].text in found.message or key.refused


def test_defaults_harmless_values_and_blocks_that_are_off_say_nothing():
    for path, key in walk(installed()):
        stated = key.keys is None and key.default is not None and not key.deprecated
        kind = fate_of(path)[1]
        if stated and kind is not None and kind.kind != RIGHT:
            found = check(nest(path, key.default), make_config(), 2)
            assert not [f for f in found if kind.text in f.message], path
    quiet: list[dict[str, Any]] = [
        {'sequence_parallel_size': 1}, {'tensor_parallel': {'autotp_size': 1}},
        {'hybrid_engine': {'max_out_tokens': 64}}, {'expert_parallel': {'autoep_size': 2}},
        {'bfloat16': {'enabled': False}},
    ]  # fmt: skip
    for tree in quiet:
        assert check(tree, make_config(), 2) == [], tree


def test_a_field_by_its_other_name_has_the_same_fate():
    key = find(installed(), ('tensor_parallel', 'replace_with_kernel_inject'))
    assert key is not None
    (found,) = check({'tensor_parallel': {'replace_with_kernel_inject': True}}, make_config(), 2)
    assert found.pointer == '/tensor_parallel'


def test_the_table_in_the_documents_is_that_of_the_installed_version(capsys):
    assert main(['config', 'ds-keys']) == 0
    told = 'run: internvl-ds config ds-keys > docs/ds_config.md'
    assert (ROOT / 'docs' / 'ds_config.md').read_text() == capsys.readouterr().out, told
