"""Contradictions, and settings that train wrongly, in a ds_config of right keys and types. Pure.

Each rule is a function from `Facts` to findings. A rule that needs a value which an earlier check
found wrong keeps silent: that fault has its finding.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
from yacs.config import CfgNode

from internvl_ds.config.ds import resolve as ds
from internvl_ds.config.ds import schema
from internvl_ds.config.ds.auto_values import Filling
from internvl_ds.config.ds.diagnostics import Diagnostic, diagnostic, nearest, shown
from internvl_ds.config.ds.fates import findings_of
from internvl_ds.config.ds.pairs import ACCUMULATION, BATCH, MICRO_BATCH
from internvl_ds.config.ds.schema import Key
from internvl_ds.config.ds.unsupported import NAMES_OF_DTYPE, unsupported_settings
from internvl_ds.config.ds.validate_keys import Shape, check_shape
from internvl_ds.config.mirror import mirror_of
from internvl_ds.config.tree import value_at
from internvl_ds.errors import ConfigError

_ZERO = 'zero_optimization'

# Beside those that are called stage3_...: what DeepSpeed documents, or reads, for ZeRO-3 only.
_STAGE_3_ONLY = (
    'sub_group_size', 'zero_hpz_partition_size', 'memory_efficient_linear',
    'override_module_apply', 'pipeline_loading_checkpoint', 'log_trace_cache_warnings',
    'save_muon_momentum_buffer_in_memory', 'leaf_module',
)  # fmt: skip


# DeepSpeed's own optimizers that ZeRO stages 1 to 3 step with other numbers, and why.
_NOT_IN_PIECES = {
    'lamb': 'its trust ratio is of a whole tensor, and ZeRO gives it flat pieces of many tensors',
    'muon': 'DeepSpeed orthogonalises gradients there before their norm is taken and clipped, the '
    "class token's and the head's among them (TRAIN.OPTIMIZER.NAME muon trains right, and so does "
    "timm's or torch's Muon passed to initialize)",
    'adagrad': 'DeepSpeed makes another one in its place, which a checkpoint does not find',
}


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    Attributes:
        shape: the ds_config without unknown keys and invalid values.
        schema: what the installed DeepSpeed knows.
        config: the yacs tree.
        world_size: the number of data-parallel ranks.
        optimizer_in_code, scheduler_in_code: whether the program makes one and passes it.
        cpu_optimizer: whether that optimizer is one of DeepSpeed's for the CPU.
    """

    shape: Shape
    schema: Key
    config: CfgNode
    world_size: int
    optimizer_in_code: bool
    scheduler_in_code: bool
    cpu_optimizer: bool

    @property
    def tree(self) -> dict[str, Any]:
        """The ds_config, as far as it is right."""
        return self.shape.tree

    @property
    def zero(self) -> Mapping[str, Any]:
        """Its block /zero_optimization."""
        return self.tree.get(_ZERO, {})

    @property
    def stage(self) -> int | None:
        """The ZeRO stage; None where what is stated is wrong."""
        if self.shape.doubts(f'/{_ZERO}/stage'):
            return None
        stage = self.zero.get('stage', 0)
        return 0 if stage == 'auto' else int(stage)

    @property
    def low(self) -> str | None:
        """The block of the low-precision engine in use; None for none, or in doubt."""
        mode = ds.precision_or_fault(self.tree, self.config)
        return mode if isinstance(mode, str) and mode in NAMES_OF_DTYPE else None


def batch_rule(facts: Facts) -> Iterator[Diagnostic]:
    """Batch sizes and clipping against the yacs config, and the batch triple against itself."""
    filling = Filling(facts.tree)
    ds.settle_batch(filling, facts.config, facts.world_size)
    factors_doubtful = facts.shape.doubts(MICRO_BATCH.pointer, ACCUMULATION.pointer)
    for fault in filling.findings:
        if fault.pointer != BATCH.pointer or not factors_doubtful:
            yield fault


def precision_rule(facts: Facts) -> Iterator[Diagnostic]:
    """Precision blocks against each other and against AMP_OPT_LEVEL and AMP_TYPE."""
    doubtful = facts.shape.doubts(*(f'/{block}/enabled' for block in ds.PRECISION_BLOCKS))
    mode = ds.precision_or_fault(facts.tree, facts.config)
    if isinstance(mode, Diagnostic) and not (doubtful and mode.pointer):
        yield mode
    if isinstance(mode, Diagnostic) or doubtful:
        return
    dtype = value_at(facts.tree, 'data_types', 'param_dtype')
    names = NAMES_OF_DTYPE.get(facts.low or '', ('fp32', 'float32', 'float', 'torch.float32'))
    if dtype not in (None, 'auto', *names):
        yield diagnostic(
            '/data_types/param_dtype',
            f'is {shown(dtype)}, but the model trains in {names[0]} (AMP_OPT_LEVEL and the '
            'precision blocks): DeepSpeed refuses that; remove the key',
            yacs='AMP_OPT_LEVEL',
        )


def fates_rule(facts: Facts) -> Iterator[Diagnostic]:
    """Keys that are refused or have no effect, whatever else is stated."""
    yield from findings_of(facts.tree, facts.schema, facts.shape.misspelt)


def stage_rule(facts: Facts) -> Iterator[Diagnostic]:
    """Options of ZeRO-3 below it, and others that the stage does not have."""
    stage = facts.stage
    if stage is None:
        return
    for name, value in facts.zero.items() if stage < 3 else ():
        key = schema.find(facts.schema, (_ZERO, name))
        if key is None or key.deprecated or value in ('auto', key.default):
            continue  # a default changes nothing, at any stage
        if key.name.startswith('stage3_') or name in _STAGE_3_ONLY:
            yield diagnostic(
                f'/{_ZERO}/{name}',
                f'is an option of ZeRO stage 3, and /{_ZERO}/stage is {stage}: it would have no '
                'effect; remove it, or set the stage to 3',
            )
    if facts.zero.get('legacy_stage1') is True:
        yield diagnostic(f'/{_ZERO}/legacy_stage1', 'was removed from DeepSpeed; remove the key')
    dividing = facts.tree.get('gradient_predivide_factor', 1) != 1
    prescaling = facts.tree.get('prescale_gradients') is True
    if stage == 2 and (dividing or prescaling) and facts.zero.get('reduce_scatter', True) is True:
        yield diagnostic(
            '/gradient_predivide_factor' if dividing else '/prescale_gradients',
            f'is not supported by DeepSpeed at ZeRO stage 2 with /{_ZERO}/reduce_scatter; set that '
            'to false, or remove the key',
        )


def offload_rule(facts: Facts) -> Iterator[Diagnostic]:
    """Offload without its required stage or other settings."""
    stage, names = facts.stage, list[str]()
    for name, old in (('offload_param', 'cpu_offload_param'), ('offload_optimizer', 'cpu_offload')):
        device = value_at(facts.zero, name, 'device', default='none')
        if device not in ('none', 'auto', 'nvme'):
            names.append(name)
        elif device != 'nvme' and facts.zero.get(old) is True:
            names.append(old)
    if stage is None:
        return
    for name in names:
        least = 3 if 'param' in name else 1
        if stage < least:
            at_least = 'stage 3' if least == 3 else 'stage 1, 2 or 3'
            yield diagnostic(
                f'/{_ZERO}/{name}',
                f'{name} needs ZeRO {at_least}, and /{_ZERO}/stage is {stage}',
            )
            if 'param' not in name:
                return
    name = next((n for n in ('offload_optimizer', 'cpu_offload') if n in names), '')
    if not name:
        return
    value = value_at(facts.zero, name, 'ratio', default=1.0)
    if value not in (1.0, 'auto') and stage < 3:
        yield diagnostic(
            f'/{_ZERO}/{name}/ratio',
            f'is {shown(value)}, which needs ZeRO stage 3, and /{_ZERO}/stage is {stage}',
        )
    foreign = facts.optimizer_in_code and not facts.cpu_optimizer
    if value not in (1.0, 'auto') and stage == 3 and foreign:
        yield diagnostic(
            f'/{_ZERO}/{name}/ratio',
            f'is {shown(value)}, which takes an optimizer of DeepSpeed for the CPU '
            '(DeepSpeedCPUAdam), and another was passed; pass one, or remove the key',
        )
    forced = facts.tree.get('zero_force_ds_cpu_optimizer', True) is True
    if foreign and forced and not facts.shape.doubts('/zero_force_ds_cpu_optimizer'):
        yield diagnostic(
            f'/{_ZERO}/{name}',
            'DeepSpeed refuses to offload an optimizer that is none of its own for the CPU; set '
            '/zero_force_ds_cpu_optimizer to false to have the one that the code makes',
        )


def optimizer_rule(facts: Facts) -> Iterator[Diagnostic]:
    """The JSON's optimizer: it must be the only one, and take its params."""
    section = facts.tree.get('optimizer')
    if not isinstance(section, Mapping):
        return
    if facts.optimizer_in_code:
        yield diagnostic(
            '/optimizer',
            'the ds_config has an /optimizer section and an optimizer was passed as well: '
            'DeepSpeed would ignore the section; remove it, or pass optimizer=None',
        )
        return
    params = section.get('params', {})
    if 'max_grad_norm' in params:
        yield diagnostic(
            '/optimizer/params/max_grad_norm',
            'clips a second time, and DeepSpeed refuses it; use /gradient_clipping alone',
        )
        params = {name: value for name, value in params.items() if name != 'max_grad_norm'}
    name = yield from _type_of(facts, 'optimizer', schema.optimizer_types())
    if name is None:
        return
    on_cpu = value_at(facts.zero, 'offload_optimizer', 'device', default='none') != 'none'
    kind = name.lower()
    if facts.stage and kind in _NOT_IN_PIECES and not (kind == 'adagrad' and on_cpu):
        yield diagnostic(
            '/optimizer/type',
            f'is {name} at ZeRO stage {facts.stage}: {_NOT_IN_PIECES[kind]}; use stage 0, or an '
            'optimizer such as AdamW, SGD or Lion',
        )
    key = schema.optimizer_params(name, params, on_cpu)
    if key is not None and isinstance(params, Mapping):
        # torch_adam chooses the class, misspelt as well
        key = schema.optimizer_params(name, check_shape(params, key).tree, on_cpu)
        yield from _params('optimizer', params, key)


def scheduler_rule(facts: Facts) -> Iterator[Diagnostic]:
    """The JSON's scheduler: likewise."""
    section = facts.tree.get('scheduler')
    if not isinstance(section, Mapping):
        return
    if facts.scheduler_in_code:
        yield diagnostic(
            '/scheduler',
            'the ds_config has a /scheduler section and a scheduler was passed as well: both would '
            'set the learning rate; remove the section, or pass none',
        )
        return
    has_optimizer = facts.optimizer_in_code or 'optimizer' in facts.tree
    if not has_optimizer and not facts.shape.doubts('/optimizer'):
        yield diagnostic('/scheduler', 'needs an optimizer: there is no /optimizer section')
        return
    name = yield from _type_of(facts, 'scheduler', schema.scheduler_types())
    params = section.get('params', {})
    doubtful = facts.shape.doubts('/scheduler/params')
    if name is not None and not doubtful and isinstance(params, Mapping):
        yield from _params('scheduler', params, schema.scheduler_params(name))


def unsupported_rule(facts: Facts) -> Iterator[Diagnostic]:
    """`unsupported_settings` of this ds_config."""
    if facts.stage is None:
        return
    tree = {**facts.tree, _ZERO: {**facts.zero, 'stage': facts.stage}}
    yield from unsupported_settings(
        tree, facts.low, optimizer=not facts.optimizer_in_code, version=deepspeed.__version__
    )


def mirror_rule(facts: Facts) -> Iterator[Diagnostic]:
    """What `mirror_of` refuses: found before a run rather than at its first save."""
    try:
        mirror_of(facts.config)
    except ConfigError as error:
        yield diagnostic('', str(error), yacs='CHECKPOINT.MIRROR')


RULES: tuple[Callable[[Facts], Iterator[Diagnostic]], ...] = (
    batch_rule, precision_rule, fates_rule, stage_rule, offload_rule, optimizer_rule,
    scheduler_rule, unsupported_rule, mirror_rule,
)  # fmt: skip


def _type_of(facts: Facts, section: str, types: list[str]) -> Generator[Diagnostic, None, Any]:
    """Returns the type of a section; a finding and None where it is missing or unknown."""
    pointer = f'/{section}/type'
    name = facts.tree[section].get('type')
    if facts.shape.doubts(pointer):
        return None
    if name is None:
        yield diagnostic(pointer, f'is missing: DeepSpeed would train without this {section}')
        return None
    lower_case = {k for k in types if k == k.lower()}  # DeepSpeed's own optimizers, in any case
    if name in types or name.lower() in lower_case:
        return name
    near = nearest(name, types, 0.6)
    hint = f'the nearest is {near}' if near else f'known are {", ".join(types)}'
    yield diagnostic(pointer, f'is {shown(name)}, and DeepSpeed knows no such {section}; {hint}')
    return None


def _params(section: str, params: Mapping[str, Any], key: Key | None) -> Iterator[Diagnostic]:
    if key is None:
        return
    shape = check_shape(params, key, path=(section, 'params'))
    yield from shape.findings
    for name in key.required:
        pointer = f'/{section}/params/{name}'
        if name not in shape.tree and not shape.doubts(pointer):
            yield diagnostic(pointer, 'is missing, and has no default')
