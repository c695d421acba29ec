"""The advice at the end of a plan: which option to take, why, and what to write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from yacs.config import CfgNode

from internvl_ds.config.ds.load import load_ds_config, shipped_dir
from internvl_ds.tools.plan.options import (
    ALL,
    NONE,
    OPTIMIZER,
    USABLE,
    Machine,
    Option,
    choose,
    section,
)
from internvl_ds.tools.text import human_size


def advice(
    found: Sequence[Option], config: CfgNode, base: Mapping[str, Any], named: str, machine: Machine
) -> str:
    """Which option to take, why, and what to write on the command line, in one sentence.

    Args:
        found: by `options`.
        config, base: the yacs tree and the ds_config that the options came from.
        named: the ds_config's name on the command line; '' where there is none.
        machine: what there is.
    """
    taken = choose(found)
    there = human_size(machine.gpu_bytes)
    if taken is None:
        least = min(found, key=lambda option: option.need.device)
        short = (
            f'a host then needs {human_size(least.host_bytes)} of its '
            f'{human_size(machine.host_bytes or 0)}'
            if least.micro_batch
            else f'a GPU then needs {human_size(least.need.device)} of its {there} with '
            f'{least.need.micro_batch} images'
        )
        return (
            f'Nothing fits: the least is {least.name}, and {short}; take more GPUs, more memory, '
            'or a smaller model or image.'
        )
    return (
        f'Take {taken.name}, {taken.micro_batch} images a micro-batch (up to '
        f'{taken.largest_micro_batch} fit into {USABLE:.0%} of {there}), because '
        f'{_reason(taken, found)}: {_words(taken, config, base, named)}'
    )


def _reason(taken: Option, found: Sequence[Option]) -> str:
    """What is wrong with the option that would be simpler."""
    simpler = next(_simpler(taken, found), None)
    if simpler is None:
        return 'it fits, and nothing communicates or computes less'
    if not simpler.fits_host:
        return f'{simpler.name} needs {human_size(simpler.host_bytes)} on a host'
    if simpler.largest_micro_batch == 0:
        return f'{simpler.name} does not fit with a single image'
    if simpler.micro_batch < taken.micro_batch:
        return f'{simpler.name} fits {simpler.largest_micro_batch} images only'
    return f'it is no slower than {simpler.name} and needs less'


def _simpler(taken: Option, found: Sequence[Option]) -> Iterator[Option]:
    """The same without checkpointing, else without offload, else at the stage below."""
    for option in found:
        same_stage, same_offload = option.stage == taken.stage, option.offload == taken.offload
        if taken.recompute:
            wanted = same_stage and same_offload and not option.recompute
        elif taken.offload != NONE:
            wanted = same_stage and option.offload == NONE and not option.recompute
        else:
            wanted = option.stage == taken.stage - 1 and same_offload and not option.recompute
        if wanted:
            yield option


def _words(taken: Option, config: CfgNode, base: Mapping[str, Any], named: str) -> str:
    """The flags of the training program."""
    opts = [f'DATA.BATCH_SIZE {taken.micro_batch}']
    if taken.accumulation != max(1, config.TRAIN.ACCUMULATION_STEPS or 0):
        opts.append(f'TRAIN.ACCUMULATION_STEPS {taken.accumulation}')
    if taken.recompute != bool(config.TRAIN.USE_CHECKPOINT):
        opts.append(f'TRAIN.USE_CHECKPOINT {taken.recompute}')
    flags = f'--opts {" ".join(opts)}'
    text = json.dumps({'zero_optimization': section(taken.stage, taken.offload)})
    force = ', "zero_force_ds_cpu_optimizer": false' if taken.offload != NONE else ''
    text = f'{text[:-1]}{force}}}'
    if named and not _is(base, taken):
        return f'--deepspeed_config {named} {flags}, with {text} in that file'
    name = named or _shipped(taken)
    if name:
        return f'--deepspeed_config {name} {flags}'
    return f'{flags}, and a --deepspeed_config of {text}'


def _shipped(taken: Option) -> str:
    """The shortest name of a ds_config that ships and says just this; '' if there is none."""
    names = sorted((p.stem for p in shipped_dir().glob('*.json')), key=lambda n: (len(n), n))
    return next((name for name in names if _is(load_ds_config(name), taken)), '')


def _is(tree: Mapping[str, Any], option: Option) -> bool:
    zero = tree.get('zero_optimization', {})
    moved = [
        (zero.get(key) or {}).get('device', 'none') == 'cpu'
        for key in ('offload_optimizer', 'offload_param')
    ]
    wanted = {NONE: [False, False], OPTIMIZER: [True, False], ALL: [True, True]}
    return zero.get('stage', 0) == option.stage and moved == wanted[option.offload]
