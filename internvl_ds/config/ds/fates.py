"""The fate of each key of a ds_config: it trains right, is refused, or has no effect. Pure.

A fate holds for its key and for all below it that has none of its own. It speaks of a value that is
stated, that is not DeepSpeed's default, and that lies in no block whose ``enabled`` is false.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

from internvl_ds.config.ds import schema
from internvl_ds.config.ds.diagnostics import ERROR, WARNING, Diagnostic, diagnostic, pointer_of
from internvl_ds.config.ds.introspect import Path
from internvl_ds.config.ds.schema import Key
from internvl_ds.config.tree import value_at

RIGHT, REFUSED, UNUSED = 'trains right', 'refused', 'has no effect here'

_HEAD = """# Keys of a ds_config

What becomes of each key that DeepSpeed {version} reads, where it is stated and is not the default:

- *trains right*: as plain PyTorch on one process does, within rounding
  (`tests/zero/test_ds_keys.py` and the tests that it names), or it changes no number;
- *refused*: an error before training, from `internvl-ds config check`, `initialize` and the
  training program;
- *has no effect here*: a warning.

This file is what `internvl-ds config ds-keys` prints, for the DeepSpeed that is installed.
"""


class Fate(NamedTuple):
    """The fate of a key.

    Attributes:
        kind: RIGHT, REFUSED or UNUSED.
        text: why, and what to do; '' for RIGHT, or what there is to know.
        harmless: a value, beside the default, that changes nothing.
    """

    kind: str
    text: str = ''
    harmless: Any = None


_SAVES = 'save_checkpoint writes the files itself, each rank its own; remove the key'
_LOADS = 'load_checkpoint reads tags of every layout by itself; remove the key'
_OWN_DATA = 'the training program and scripts make their own data loaders'
_ONE_AXIS = 'ranks share the data only (data parallelism), in this package; remove the key'
_SPLIT = (
    'ranks share the data only: DeepSpeed 0.19.8 splits no layer of a ViT of timm by itself, and '
    'with a partition_config for its MLPs the losses are not those of plain PyTorch; remove the key'
)
_MASTERS = (
    'the masters and moments would be kept in half precision, and updates smaller than half a unit '
    'of a weight are lost: the numbers are not those of plain PyTorch; remove the key'
)
_ROUNDED = (
    'weights would be rounded to 8 bits at each gather, by kernels that need a GPU: the numbers '
    'are not those of plain PyTorch; remove the key'
)
_NVME = 'offload to NVMe is refused: DeepSpeed does not go on from its checkpoints as it saved them'
# Of keys that an earlier DeepSpeed still reads.
_REMOVED = 'it was removed from DeepSpeed, and is tried with none that reads it; remove the key'
_OUTER = 'belongs to another kind of DeepSpeed engine, which `initialize` does not make'

# Looked at in DeepSpeed 0.19.8. What is refused or unused differs from plain PyTorch, or from what
# the key promises, with no way here to mend it.
FATES: dict[str, Fate] = {
    '/activation_checkpointing': Fate(
        UNUSED,
        'it configures deepspeed.checkpointing, which no model of timm or this package calls: '
        'TRAIN.USE_CHECKPOINT recomputes activations',
    ),
    '/aio': Fate(UNUSED, _NVME),
    '/autotuning': Fate(UNUSED, '`internvl-ds tune` tries settings'),
    '/autotuning/enabled': Fate(
        REFUSED, 'DeepSpeed ends the process after some steps; use `internvl-ds tune`'
    ),
    '/bf16': Fate(RIGHT),
    '/bf16/bf16_master_weights_and_grads': Fate(REFUSED, _MASTERS),
    '/bf16/bf16_optimizer_states': Fate(REFUSED, _MASTERS),
    '/bfloat16': Fate(REFUSED, 'is the old name of /bf16; rename it'),
    '/checkpoint': Fate(UNUSED, _SAVES),
    '/checkpoint/load_universal': Fate(REFUSED, _LOADS),
    '/checkpoint/tag_validation': Fate(RIGHT, 'all ranks save under the name of rank 0'),
    '/checkpoint/use_node_local_storage': Fate(
        REFUSED, 'a tag is one directory that all ranks reach; set OUTPUT to a shared file system'
    ),
    '/checkpoint/writer': Fate(REFUSED, _SAVES),
    '/comet': Fate(RIGHT),
    '/comms_logger': Fate(RIGHT),
    '/communication_data_type': Fate(RIGHT, 'gradients are rounded to it before they are summed'),
    '/compile': Fate(UNUSED, 'its keys are those of DeepCompile: TRAIN.COMPILE compiles'),
    '/compile/deepcompile': Fate(
        REFUSED,
        'DeepCompile runs on GPUs alone, and its numbers are not compared with plain PyTorch; set '
        "TRAIN.COMPILE 'inductor', and remove the key",
    ),
    '/csv_monitor': Fate(RIGHT),
    '/data_efficiency': Fate(UNUSED, _OWN_DATA),
    '/data_efficiency/enabled': Fate(REFUSED, f'{_OWN_DATA}, which it would not reach'),
    '/data_parallel_size': Fate(UNUSED, 'the launcher says how many ranks there are'),
    '/data_types': Fate(RIGHT),
    '/dataloader_drop_last': Fate(UNUSED, _OWN_DATA),
    '/datastates_ckpt': Fate(REFUSED, _SAVES),
    '/disable_allgather': Fate(UNUSED, 'DeepSpeed reads it and uses it nowhere'),
    '/disable_python_gc': Fate(RIGHT),
    '/dump_state': Fate(RIGHT),
    '/expert_parallel': Fate(REFUSED, _ONE_AXIS),
    '/flops_profiler': Fate(RIGHT),
    '/fp16': Fate(RIGHT),
    '/fp16/fp16_master_weights_and_grads': Fate(REFUSED, _MASTERS),
    '/gradient_accumulation_steps': Fate(RIGHT),
    '/gradient_allreduce_op': Fate(
        REFUSED,
        'gradients are the mean over the ranks: their sum is of another loss, whose norm grows '
        'with the ranks; scale the learning rate, and remove the key',
    ),
    '/gradient_clipping': Fate(RIGHT),
    '/gradient_predivide_factor': Fate(RIGHT),
    '/hybrid_engine': Fate(REFUSED, f'{_OUTER}; remove the block'),
    '/log_level': Fate(RIGHT),
    '/managed_gradient_accumulation': Fate(RIGHT),
    '/memory_breakdown': Fate(RIGHT),
    '/optimizer': Fate(RIGHT, 'where the code passes none'),
    '/pipeline': Fate(UNUSED, _OUTER),
    '/prescale_gradients': Fate(RIGHT),
    '/scheduler': Fate(RIGHT, 'where the code passes none'),
    '/seq_parallel_communication_data_type': Fate(UNUSED, 'ranks share no sequence'),
    '/sequence_parallel_size': Fate(REFUSED, _ONE_AXIS, harmless=1),
    '/steps_per_print': Fate(RIGHT),
    '/tensor_parallel': Fate(UNUSED, 'ranks share no layer'),
    '/tensor_parallel/autotp_size': Fate(REFUSED, _SPLIT, harmless=1),
    '/tensor_parallel/tp': Fate(REFUSED, _SPLIT),
    '/tensorboard': Fate(RIGHT),
    '/timers': Fate(RIGHT),
    '/torch_autocast': Fate(RIGHT),
    '/train_batch_size': Fate(RIGHT),
    '/train_micro_batch_size_per_gpu': Fate(RIGHT),
    '/use_data_before_expert_parallelism': Fate(UNUSED, 'there are no experts'),
    '/vocabulary_size': Fate(UNUSED, 'DeepSpeed compares it with a multiple of 8, and that is all'),
    '/wall_clock_breakdown': Fate(RIGHT),
    '/wandb': Fate(RIGHT),
    '/weight_quantization': Fate(
        REFUSED, 'weights would be rounded when the model is built; remove the block'
    ),
    '/zero_allow_untested_optimizer': Fate(RIGHT, 'this package sets it'),
    '/zero_force_ds_cpu_optimizer': Fate(RIGHT),
    '/zero_optimization': Fate(RIGHT),
    '/zero_optimization/elastic_checkpoint': Fate(UNUSED, _LOADS),
    '/zero_optimization/load_from_fp32_weights': Fate(UNUSED, _LOADS),
    **{
        f'/zero_optimization/{block}/{key}': Fate(UNUSED, _NVME)
        for block, keys in (
            ('offload_param', ('nvme_path', 'buffer_count', 'buffer_size', 'max_in_cpu')),
            ('offload_optimizer', ('nvme_path', 'buffer_count', 'pipeline_read', 'pipeline_write')),
        )
        for key in keys
    },
    '/zero_optimization/offload_param/device': Fate(RIGHT, f'"nvme": {_NVME}'),
    '/zero_optimization/offload_optimizer/device': Fate(RIGHT, f'"nvme": {_NVME}'),
    '/zero_optimization/offload_optimizer/super_offload': Fate(
        REFUSED,
        'it reads the clipping during the backward pass, before the boundary is known, and keeps '
        'its moments where no tag has them; offload without it',
    ),
    '/zero_optimization/zenflow': Fate(
        REFUSED,
        'most gradients are applied updates later than by plain PyTorch, and tags lack those that '
        'wait; remove the block',
    ),
    '/zero_optimization/leaf_module': Fate(
        RIGHT, 'of modules whose inputs need gradients: others fail in the backward pass'
    ),
    '/zero_optimization/zero_quantized_gradients': Fate(
        REFUSED, 'gradients would be rounded to 4 bits before they are summed; remove the key'
    ),
    '/zero_optimization/zero_quantized_nontrainable_weights': Fate(REFUSED, _ROUNDED),
    '/zero_optimization/zero_quantized_weights': Fate(REFUSED, _ROUNDED),
    **dict.fromkeys(
        (
            '/amp', '/compression_training', '/curriculum_learning', '/elasticity',
            '/graph_harvesting', '/nebula', '/progressive_layer_drop', '/sparse_attention',
            '/sparse_gradients', '/zero_optimization/mics_shard_size',
            '/zero_optimization/mics_hierarchical_params_gather',
            '/zero_optimization/zeropp_loco_param',
        ),
        Fate(REFUSED, _REMOVED),
    ),
}  # fmt: skip


def fate_of(path: Path) -> tuple[str, Fate | None]:
    """The fate of a key, and the pointer at which it stands; None where no key above has one."""
    for depth in range(len(path), 0, -1):
        pointer = pointer_of(path[:depth])
        if pointer in FATES:
            return pointer, FATES[pointer]
    return '', None


def as_markdown(root: Key, version: str) -> str:
    """A table of every key of a schema with its fate, for the DeepSpeed version that it is of."""
    lines = [
        _HEAD.format(version=version),
        '| key | default | fate | |',
        '| --- | --- | --- | --- |',
    ]
    for path, key in schema.walk(root):
        if key.name != path[-1]:
            continue  # another name of the same
        fate = Fate(REFUSED, key.refused) if key.refused else fate_of(path)[1]
        default = '' if key.keys is not None or key.default is None else f'`{key.default!r}`'
        assert fate is not None
        words = ' '.join(fate.text.split()).replace('|', '\\|')
        lines.append(f'| `{pointer_of(path)}` | {default} | {fate.kind} | {words} |')
    return '\n'.join([*lines, ''])


def findings_of(
    tree: Mapping[str, Any], root: Key, misspelt: Container[str] = ()
) -> Iterator[Diagnostic]:
    """An error for each fate REFUSED that is met, and a warning for each UNUSED; once a fate.

    Args:
        tree: a ds_config of right keys and types.
        root: the schema.
        misspelt: pointers of keys that are not stated like that, and so have a finding.
    """
    met = set()
    for path, key, value in _values(tree, root):
        pointer, fate = fate_of((*path[:-1], key.name))
        if fate is None or fate.kind == RIGHT or pointer in met or _is_off(tree, path, root):
            continue
        if any(pointer_of(path[:depth]) in misspelt for depth in range(1, len(path) + 1)):
            continue
        if value not in (None, 'auto', key.default, fate.harmless):
            met.add(pointer)
            severity = ERROR if fate.kind == REFUSED else WARNING
            yield diagnostic(pointer, f'{fate.kind}: {fate.text}', severity)


def _values(tree: Mapping[str, Any], key: Key, path: Path = ()) -> Iterator[tuple[Path, Key, Any]]:
    """Every value that is stated under a key, with its path and what the schema says of it."""
    for name, value in tree.items():
        entry = (key.keys or {}).get(name)
        if entry is not None and entry.keys is not None and isinstance(value, Mapping):
            yield from _values(value, entry, (*path, name))
        elif entry is None and not key.complete:
            yield (*path, name), Key(name), value
        elif entry is not None and not entry.refused:
            yield (*path, name), entry, value


def _is_off(tree: Mapping[str, Any], path: Path, root: Key) -> bool:
    """Whether a block around the key is not enabled, as it says or by default."""
    for depth in range(1, len(path)):
        switch = schema.find(root, (*path[:depth], 'enabled'))
        if switch and not value_at(tree, *path[:depth], 'enabled', default=switch.default):
            return True
    return False
