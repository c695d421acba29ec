"""The advice at the end of a plan: which option to take, why, and what to write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from yacs.config import CfgNode

from internvl_ds.config.ds.load import load_ds_config, shipped_dir
from internvl_ds.tools.plan import options
from internvl_ds.tools.plan.options import NONE, Machine, Option
from internvl_ds.tools.text import human_size


def advice(
    ways: Sequence[Option], config: CfgNode, base: Mapping[str, Any], name: str, machine: Machine
) -> str:
    """Which option to take, why, and what to write on the command line, in one sentence.

    Args:
        ways: all options, of the yacs tree ``config`` and the ds_config ``base``.
        name: the ds_config's name on the command line; '' where there is none.
    """
    choice = options.choose(ways)
    memory = human_size(machine.gpu_bytes)
    if choice is None:
        least = min(ways, key=lambda option: option.need.device)
        short = (
            f'a host then needs {human_size(least.host_bytes)} of its '
            f'{human_size(machine.host_bytes or 0)}'
            if least.micro_batch
            else f'a GPU then needs {human_size(least.need.device)} of its {memory} with '
            f'{least.need.micro_batch} images'
        )
        return (
            f'Nothing fits: the least is {least.name}, and {short}; take more GPUs, more memory, '
            'or a smaller model or image.'
        )
    return (
        f'Take {choice.name}, {choice.micro_batch} images a micro-batch (up to '
        f'{choice.largest_micro_batch} fit into {human_size(machine.usable)} of {memory}), '
        f'because {_reason(choice, ways)}: {_words(choice, config, base, name)}'
    )


def _reason(choice: Option, ways: Sequence[Option]) -> str:
    """What is wrong with the option that would be simpler."""
    simpler = next((option for option in ways if _is_simpler(option, choice)), None)
    if simpler is None:
        return 'it fits, and nothing communicates or computes less'
    if not simpler.fits_host:
        return f'{simpler.name} needs {human_size(simpler.host_bytes)} on a host'
    if simpler.largest_micro_batch == 0:
        return f'{simpler.name} does not fit with a single image'
    if simpler.micro_batch < choice.micro_batch:
        return f'{simpler.name} fits {simpler.largest_micro_batch} images only'
    return f'it is no slower than {simpler.name} and needs less'


def _is_simpler(option: Option, choice: Option) -> bool:
    """Whether it is the choice without checkpointing, else without offload, else a stage below."""
    stage, offload = choice.stage, choice.offload
    if not choice.recompute and offload != NONE:
        offload = NONE
    elif not choice.recompute:
        stage -= 1
    return (option.stage, option.offload, option.recompute) == (stage, offload, False)


def _words(choice: Option, config: CfgNode, base: Mapping[str, Any], name: str) -> str:
    """The flags of the training program."""
    opts = [f'DATA.BATCH_SIZE {choice.micro_batch}']
    if choice.accumulation != max(1, config.TRAIN.ACCUMULATION_STEPS or 0):
        opts.append(f'TRAIN.ACCUMULATION_STEPS {choice.accumulation}')
    if choice.recompute != bool(config.TRAIN.USE_CHECKPOINT):
        opts.append(f'TRAIN.USE_CHECKPOINT {choice.recompute}')
    flags = f'--opts {" ".join(opts)}'
    text = json.dumps(options.variant({}, choice.stage, choice.offload))
    if name and not _is(base, choice):
        return f'--deepspeed_config {name} {flags}, with {text} in that file'
    if name := name or _shipped(choice):
        return f'--deepspeed_config {name} {flags}'
    return f'{flags}, and a --deepspeed_config of {text}'


def _shipped(choice: Option) -> str:
    """The shortest name of a ds_config that ships and says just this; '' if there is none."""
    names = sorted((p.stem for p in shipped_dir().glob('*.json')), key=lambda n: (len(n), n))
    return next((name for name in names if _is(load_ds_config(name), choice)), '')


def _is(tree: Mapping[str, Any], option: Option) -> bool:
    zero, other = tree.get('zero_optimization', {}), options.section(option.stage, option.offload)
    return zero.get('stage', 0) == option.stage and all(
        ((zero.get(key) or {}).get('device') == 'cpu') == (key in other)
        for key in ('offload_optimizer', 'offload_param')
    )
