"""What a script over plain DeepSpeed kept in its tags, in the words of state.json.

DeepSpeed merges a script's ``client_state`` into the model states. Read are this package's own
names, and InternImage's and InternVL's (classification/main_deepspeed.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from internvl_ds.checkpoint.formats.pth_format import schedule_of_original
from internvl_ds.checkpoint.formats.state_json import require_state, state_of
from internvl_ds.checkpoint.formats.zero_shards import TagShards
from internvl_ds.checkpoint.sources.weight_files import config_node
from internvl_ds.engine.lr_schedule import MICRO_BATCHES
from internvl_ds.errors import CheckpointError, CheckpointMismatch, few
from internvl_ds.files.reading import interpreting

# What DeepSpeed 0.19 and earlier versions put there themselves.
_DEEPSPEEDS = frozenset(
    {
        'module', 'buffer_names', 'optimizer', 'param_shapes', 'frozen_param_shapes',
        'shared_params', 'frozen_param_fragments', 'data_sampler', 'random_ltd', 'skipped_steps',
        'global_steps', 'global_samples', 'dp_world_size', 'mp_world_size', 'ds_config',
        'ds_version', 'checkpoint_parallel_dimensions', 'sparse_tensor_module_names',
        'csr_tensor_module_names', 'num_experts', 'ds_autoep_layers', 'universal_checkpoint_info',
    }
)  # fmt: skip
_NUMBERS = ('max_accuracy', 'max_accuracy_ema', 'ema_decay')
_AVERAGE, _INTERN_IMAGES_SCHEDULE = 'model_ema', 'custom_lr_scheduler'
_READ = frozenset(
    {'epoch', 'config', 'lr_scheduler', 'scaler', _AVERAGE, _INTERN_IMAGES_SCHEDULE, *_NUMBERS}
)
# How scripts name the tensors of an average: as the model, as an engine does, and as a module's
# buffers must be named, which have no dots (InternImage's).
_FORMS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: f'module.{name}',
    lambda name: name.replace('.', ''),
    lambda name: f'module{name.replace(".", "")}',
)


def saved_state(shards: TagShards) -> dict[str, Any]:
    """What a tag keeps beside its tensors: its state.json, or a script's client_state."""
    state = state_of(shards.tag)
    if not state:
        with interpreting(shards.tag, CheckpointError):
            state = _in_own_words(shards)
        require_state(state, shards.tag)
    return state


def unread_keys(shards: TagShards) -> list[str]:
    """The names in a script's client_state that are not read."""
    if shards.has_manifest:
        return []
    return [key for key in shards.head if key not in _DEEPSPEEDS | _READ]


def holds_average(shards: TagShards) -> bool:
    """Whether a script kept an average in its client_state."""
    return not shards.has_manifest and isinstance(shards.head.get(_AVERAGE), Mapping)


def average_of(shards: TagShards) -> dict[str, torch.Tensor]:
    """Parameter or buffer -> averaged tensor, where `holds_average`.

    CheckpointMismatch for names that are not the model's, stand for two parameters, or leave a
    trained one out.
    """
    entries, aliases = shards.head[_AVERAGE], shards.aliases()
    where = f'{shards.tag}: its {_AVERAGE}'
    tables = [_table(shards, form) for form in _FORMS]
    names_of = next((table for table in tables if entries.keys() <= table.keys()), None)
    if names_of is None:
        strangers = min(([k for k in entries if k not in table] for table in tables), key=len)
        raise CheckpointMismatch(
            f'{where} is of another model: {len(strangers)} names are not in it: {few(strangers)}'
        )
    for key in entries:
        if len(names_of[key]) > 1:
            raise CheckpointMismatch(
                f'{where} keeps one average, {key}, for {" and for ".join(sorted(names_of[key]))}: '
                'it is that of one of them, and does not say which'
            )
    averages: dict[str, torch.Tensor] = {}
    for key, tensor in entries.items():
        (name,) = names_of[key]
        if name in averages and not torch.equal(averages[name], tensor):
            raise CheckpointMismatch(f'{where} has two averages of {name}, which is tied')
        averages[name] = tensor
    trained_names = (name for group in shards.groups() for name in group if name)
    gaps = [name for name in trained_names if aliases.get(name, name) not in averages]
    if gaps:
        raise CheckpointMismatch(
            f'{where} is of another model: {len(gaps)} trained parameters are not in it: '
            f'{few(gaps)}'
        )
    return averages


def _table(shards: TagShards, form: Callable[[str], str]) -> dict[str, set[str]]:
    """The saved state that a name in a script's client_state means."""
    aliases, table = shards.aliases(), defaultdict(set)
    for name in shards.shapes():
        table[form(name)].add(aliases.get(name, name))
    return dict(table)


def _in_own_words(shards: TagShards) -> dict[str, Any]:
    head = shards.head
    config = config_node(head.get('config'))
    state: dict[str, Any] = {key: _number(head.get(key)) for key in _NUMBERS}
    state['schedule'] = None
    epoch = _number(head.get('epoch'))
    state['epoch'] = int(epoch) if epoch is not None and epoch == int(epoch) else None
    state['config'] = None if config is None else config.dump()
    state['loss_scale'] = _loss_scale(shards)
    for key in ('lr_scheduler', 'scaler'):
        state[key] = head[key] if isinstance(head.get(key), Mapping) else None
    if state['lr_scheduler'] is not None and 'last_batch_iteration' in state['lr_scheduler']:
        state['lr_scheduler'] = None  # of a schedule of DeepSpeed's own, which its engine restores
    if isinstance(head.get(_INTERN_IMAGES_SCHEDULE), Mapping):
        state['lr_scheduler'] = dict(head[_INTERN_IMAGES_SCHEDULE])
        state['schedule'] = _position(shards, state, config)
    if state['ema_decay'] is None and config is not None and holds_average(shards):
        average = (config.get('TRAIN') or {}).get('EMA') or {}
        state['ema_decay'] = _number(average.get('DECAY'))
    return state


def _loss_scale(shards: TagShards) -> dict[str, Any] | None:
    """A loss scale that moves, as DeepSpeed keeps it in the optimizer's state."""
    values = shards.head.get('optimizer') or {}  # stage 0
    if shards.zero_stage and shards.optim_files:
        optimizer = shards.read(shards.optim_files[0])['optimizer_state_dict']
        values = getattr(optimizer.get('loss_scaler'), '__dict__', {})
        values = {**values, 'dynamic_loss_scale': optimizer.get('dynamic_loss_scale')}
    if not values.get('dynamic_loss_scale') or 'cur_scale' not in values:
        return None
    successes = values['cur_iter'] - values['last_overflow_iter'] - 2
    return {
        'scale': values['cur_scale'],
        '_growth_tracker': max(0, successes) % values['scale_window'],
        'hysteresis_left': values.get('cur_hysteresis', 1),
    }


def _position(shards: TagShards, state: Mapping[str, Any], config: Any) -> dict[str, Any] | None:
    """The position of InternImage's schedule, for `LrSchedule.restore`; None if it counts updates.

    It is built over TRAIN.EPOCHS epochs of micro-batches, and moved when all but the last of a
    whole update are counted.
    """
    group = int(shards.ds_config.get('gradient_accumulation_steps') or 1)
    if group == 1:
        return None
    schedule = schedule_of_original({**state, 'config': config})
    if schedule is None:
        position, rest = shards.global_steps * group, 0
    else:
        position = schedule['position']
        rest = position // (state['epoch'] + 1) % group  # of an epoch, after its last whole update
    move = position - rest - 1
    return {'counts': MICRO_BATCHES, 'position': position, 'moved': move, 'group': group}


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
