"""A ds_config resolved against the yacs config. Pure; no process group.

A value that both files state must agree. Where the yacs value is left at its default an explicit
value in the JSON wins; 'auto' or an absent field takes the yacs value: `pairs` has the table.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from yacs.config import CfgNode

from internvl_ds.config.ds import pairs
from internvl_ds.config.ds.auto_values import DEFAULT, Filling, fill_buckets, fill_open_values
from internvl_ds.config.ds.diagnostics import Diagnostic, diagnostic, refuse
from internvl_ds.config.ds.pairs import ACCUMULATION, BATCH, CLIPPING, MICRO_BATCH, Pair
from internvl_ds.config.tree import default_of, get_option, set_options
from internvl_ds.errors import ConfigError

FP32, FP16, BF16 = 'fp32', 'fp16', 'bf16'
AUTOCAST_FP16, AUTOCAST_BF16 = 'torch_autocast float16', 'torch_autocast bfloat16'

# The blocks of the ds_config that switch a precision on.
PRECISION_BLOCKS = ('fp16', 'bf16', 'torch_autocast')


class Resolution(NamedTuple):
    """A ds_config resolved for one run.

    Attributes:
        tree: a ds_config with batch sizes, clipping and precision stated, and without any 'auto'
            but those that DeepSpeed itself reads, and bucket sizes while there is no model; not
            complete where a finding is an error.
        origins: JSON pointer of each value -> where the value comes from, in a few words.
        findings: the faults.
    """

    tree: dict[str, Any]
    origins: dict[str, str]
    findings: list[Diagnostic]


def resolve(
    ds_config: Mapping[str, Any], config: CfgNode, world_size: int, trained: int | None = None
) -> Resolution:
    """Fills what the JSON leaves open from the yacs config, and compares what both state.

    Args:
        ds_config: as `load_ds_config` returned it; not changed.
        config: the yacs tree, or one with fewer keys.
        world_size: the number of data-parallel ranks.
        trained: how many elements the trained parameters have. None, where there is no model yet,
            leaves bucket sizes open.

    Returns:
        The resolved ds_config; its findings name both keys that disagree, and both values.
    """
    filling = Filling(ds_config)
    settle_batch(filling, config, world_size)
    sharded = bool(get_option(config, 'TRAIN.OPTIMIZER.USE_ZERO'))
    origin = 'TRAIN.OPTIMIZER.USE_ZERO' if sharded else DEFAULT
    filling.fill('/zero_optimization/stage', int(sharded), origin)
    mode = precision_or_fault(filling.tree, config)
    if isinstance(mode, Diagnostic):
        filling.findings.append(mode)
    else:
        _set_precision(filling, mode)
    if not filling.findings:
        fill_open_values(filling, config, trained)
    return Resolution(filling.tree, filling.origins, filling.findings)


def resolve_or_raise(
    ds_config: Mapping[str, Any], config: CfgNode, world_size: int, trained: int | None = None
) -> dict[str, Any]:
    """The tree of `resolve`; raises ConfigError with every finding."""
    tree, _, findings = resolve(ds_config, config, world_size, trained)
    refuse(findings)
    return tree


def size_buckets(resolution: Resolution, trained: int) -> Resolution:
    """A resolution with the bucket sizes of a model that has so many trained elements."""
    filling = Filling(resolution.tree, resolution.origins)
    fill_buckets(filling, trained)
    return Resolution(filling.tree, filling.origins, resolution.findings)


def settle_batch(filling: Filling, config: CfgNode, world_size: int) -> None:
    """States the batch sizes and the clipping, and compares them with the yacs config."""
    micro = int(_settle_number(filling, MICRO_BATCH, config))
    steps = max(1, int(_settle_number(filling, ACCUMULATION, config)))
    filling.put(MICRO_BATCH.pointer, micro, MICRO_BATCH.yacs)
    filling.put(ACCUMULATION.pointer, steps, ACCUMULATION.yacs)
    total, product = filling.value_of(BATCH.pointer), micro * steps * world_size
    if total not in (None, product) and not filling.findings:
        filling.refuse(
            BATCH.pointer,
            f'{BATCH.pointer} is {total}, but {micro} images a micro-batch x {steps} accumulation '
            f"steps x {world_size} ranks = {product}; set it to 'auto' to have it computed",
        )
    origin = f'{micro} images x {steps} accumulation steps x {world_size} ranks'
    filling.put(BATCH.pointer, product, origin)
    clip = float(_settle_number(filling, CLIPPING, config))
    filling.put(CLIPPING.pointer, clip, CLIPPING.yacs)


def adopt(config: CfgNode, resolved: Mapping[str, Any]) -> None:
    """Writes the JSON's decisions into the yacs config, so that loop and engine agree."""
    settings = (MICRO_BATCH, ACCUMULATION, CLIPPING)
    set_options(config, {pair.yacs: resolved[pair.key] for pair in settings})


def for_inference(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The ds_config of an engine without an optimizer, of one that `resolve` returned.

    At stages 1 and 2 there is nothing to partition then, and DeepSpeed refuses to try; what belongs
    to updates goes too.
    """
    tree = copy.deepcopy(dict(resolved))
    for key in ('optimizer', 'scheduler', 'prescale_gradients', 'gradient_predivide_factor'):
        tree.pop(key, None)
    if tree['zero_optimization']['stage'] in (1, 2):
        tree['zero_optimization'] = {'stage': 0}
        tree.get('data_types', {}).pop('grad_accum_dtype', None)
    return tree


def precision(ds_config: Mapping[str, Any], config: CfgNode) -> str:
    """As `precision_or_fault`; raises ConfigError with the fault."""
    mode = precision_or_fault(ds_config, config)
    if isinstance(mode, str):
        return mode
    raise ConfigError(str(mode))


def precision_or_fault(ds_config: Mapping[str, Any], config: CfgNode) -> str | Diagnostic:
    """The precision that JSON and yacs config agree on: one of this module's five constants.

    AMP_OPT_LEVEL O0 is fp32, O1 torch_autocast with AMP_TYPE, O2 the fp16 or bf16 engine; left at
    '' it is O1, the original's default, unless the JSON says otherwise.

    Returns:
        The fault where JSON and yacs config contradict each other, or the JSON itself.
    """
    level = get_option(config, 'AMP_OPT_LEVEL')
    amp_type = get_option(config, 'AMP_TYPE')
    if level not in ('', 'O0', 'O1', 'O2'):
        message = f'AMP_OPT_LEVEL is {level!r}; it can be O0, O1 or O2'
        return Diagnostic('', message, yacs='AMP_OPT_LEVEL')
    if amp_type not in ('float16', 'bfloat16'):
        message = f"AMP_TYPE is {amp_type!r}; it can be 'float16' or 'bfloat16'"
        return Diagnostic('', message, yacs='AMP_TYPE')
    choice = _from_yacs(level, amp_type)
    flags = {block: _enabled(ds_config, block) for block in PRECISION_BLOCKS}
    blocks = [block for block, flag in flags.items() if flag]
    if len(blocks) > 1:
        pointers = [f'/{block}' for block in blocks]
        message = f'enabled together in the ds_config: {" and ".join(pointers)}'
        return diagnostic(pointers[-1], message)
    keys = f'AMP_OPT_LEVEL {level!r} with AMP_TYPE {amp_type}'
    if not blocks and None in flags.values():  # the JSON leaves the precision to the yacs config
        if flags.get(_block_of(choice)) is not False:
            return choice
        pointer = f'/{_block_of(choice)}/enabled'
        message = f'{keys} asks for {choice}, but {pointer} is false in the ds_config'
        return diagnostic(pointer, message)
    mode = blocks[0] if blocks else FP32
    if mode == 'torch_autocast':
        half = ds_config[mode].get('dtype', 'bfloat16') in ('float16', 'fp16', 'half')
        mode = AUTOCAST_FP16 if half else AUTOCAST_BF16
    # A yacs value left at its default gives way: the level '', and the type float16.
    modes = {choice}
    if level == '':
        modes.add(mode)
    elif amp_type == 'float16':
        modes.add(_from_yacs(level, 'bfloat16'))
    if mode not in modes:
        return diagnostic(
            f'/{(blocks or PRECISION_BLOCKS)[0]}/enabled',
            f'the ds_config states {mode}, but {keys} asks for {choice}; change one of the two',
        )
    return mode


def precision_of(resolved: Any) -> str:
    """The precision of a resolved ds_config; absent blocks are off."""
    tree = resolved if isinstance(resolved, Mapping) else {}
    off = {block: {'enabled': False} for block in PRECISION_BLOCKS}
    return precision({**off, **tree}, CfgNode())


def _block_of(mode: str) -> str:
    """The block of the ds_config that switches a precision on; of fp32 there is none."""
    return mode.split()[0]


def _from_yacs(level: str, amp_type: str) -> str:
    modes = {'O0': (FP32, FP32), 'O2': (FP16, BF16)}
    return modes.get(level, (AUTOCAST_FP16, AUTOCAST_BF16))[amp_type == 'bfloat16']


def _enabled(ds_config: Mapping[str, Any], block: str) -> bool | None:
    """True or False where the JSON says so; None for 'auto' or no such block."""
    if block not in ds_config:
        return None
    flag = ds_config[block].get('enabled', False)
    return None if flag == 'auto' else bool(flag)


def _set_precision(filling: Filling, mode: str) -> None:
    origin = 'AMP_OPT_LEVEL and AMP_TYPE'
    for block in PRECISION_BLOCKS:
        if block in filling.tree or _block_of(mode) == block:
            filling.put(f'/{block}/enabled', _block_of(mode) == block, origin)
    if mode in (FP16, AUTOCAST_FP16):
        # DeepSpeed reads these for torch autocast too, where the section is not enabled.
        filling.fill('/fp16/enabled', False, origin)
        for key, value in pairs.GRAD_SCALER.items():
            filling.fill(f'/fp16/{key}', value, "torch's GradScaler")
    if mode in (AUTOCAST_FP16, AUTOCAST_BF16):
        dtype = 'float16' if mode == AUTOCAST_FP16 else 'bfloat16'
        filling.put('/torch_autocast/dtype', dtype, origin)


def _settle_number(filling: Filling, pair: Pair, config: CfgNode) -> float:
    """A number that both files may state; the JSON's if they disagree."""
    number, entry = get_option(config, pair.yacs) or 0, filling.value_of(pair.pointer)
    if entry is None:
        return number
    if isinstance(entry, bool) or not isinstance(entry, int | float):
        message = f'{pair.pointer} is {entry!r}; it must be a number or "auto"'
        filling.refuse(pair.pointer, message)
        return number
    same = entry == number or {entry, number} <= {*pair.alike}
    if not same and number != default_of(pair.yacs):
        filling.refuse(
            pair.pointer,
            f'{pair.pointer} is {entry} in the ds_config, but {pair.yacs} is {number}; make them '
            "agree, or set the JSON's to 'auto'",
        )
    return entry
