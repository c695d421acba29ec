"""What a ds_config leaves open ('auto', or absent), filled from the yacs config and the model."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

from yacs.config import CfgNode

from internvl_ds.config.tree import default_of, get_option, scale_lr
from internvl_ds.errors import ConfigError

DEFAULT = "DeepSpeed's default"
_FILE = 'the ds_config'
_ZERO = '/zero_optimization'
REDUCE_BUCKET = f'{_ZERO}/reduce_bucket_size'
_REDUCE_BUCKET_MOST = 500_000_000  # elements: DeepSpeed's default

# Sizes in elements that may stand at 'auto' until there is a model.
BUCKETS = (
    REDUCE_BUCKET,
    f'{_ZERO}/allgather_bucket_size',
    f'{_ZERO}/stage3_prefetch_bucket_size',
    f'{_ZERO}/stage3_param_persistence_threshold',
)


class Filling:
    """A ds_config that is being resolved, and where each of its values comes from.

    Attributes:
        tree: a copy of the ds_config, changed by `put` and `fill`.
        origins: JSON pointer of each value -> a few words.
    """

    def __init__(self, ds_config: Mapping[str, Any]) -> None:
        self.tree: dict[str, Any] = copy.deepcopy(dict(ds_config))
        self.origins = {pointer: _FILE for pointer, _ in _leaves(self.tree)}

    def stated(self, pointer: str) -> Any:
        """The value at a JSON pointer; None where it is absent or 'auto'."""
        node: Any = self.tree
        for key in pointer.split('/')[1:]:
            if not isinstance(node, Mapping) or key not in node:
                return None
            node = node[key]
        return None if node == 'auto' else node

    def put(self, pointer: str, value: Any, origin: str) -> None:
        """Sets a value; its origin stays the file where that states the same."""
        if self.stated(pointer) != value:
            self.origins[pointer] = origin
        *sections, last = pointer.split('/')[1:]
        node = self.tree
        for key in sections:
            node = node.setdefault(key, {})
        node[last] = value

    def fill(self, pointer: str, value: Any, origin: str) -> None:
        """Sets a value where none is stated."""
        if self.stated(pointer) is None:
            self.put(pointer, value, origin)

    def autos(self) -> list[str]:
        """The pointers at which 'auto' still stands."""
        return [pointer for pointer, value in _leaves(self.tree) if value == 'auto']


def reduce_bucket_of(trained: int) -> int:
    """The reduce bucket of a model, in elements: all that are trained, or DeepSpeed's default."""
    return min(_REDUCE_BUCKET_MOST, max(1, trained))


def fill_buckets(filling: Filling, trained: int | None) -> None:
    """Fills the bucket sizes from the number of elements that are trained; None: not known yet.

    DeepSpeed allocates reduce_bucket_size elements whatever the model: 5e8 by default, which is a
    gigabyte in bf16. A bucket of all elements is the same single bucket, to the bit.
    """
    if trained is None:
        open_ones = set(filling.autos()) & set(BUCKETS)
        filling.origins.update(dict.fromkeys(open_ones, 'the model, once there is one'))
        return
    stage = filling.stated(f'{_ZERO}/stage')
    if stage in (1, 2, 3):
        size = reduce_bucket_of(trained)
        filling.fill(REDUCE_BUCKET, size, f'the model: {trained} trained elements, at most 5e8')
    for pointer in filling.autos():
        if pointer in BUCKETS:
            filling.put(pointer, _zero_default(pointer.rpartition('/')[2]), DEFAULT)


def fill_optimizer(filling: Filling, config: CfgNode, images: int) -> None:
    """Fills /optimizer/params with what the optimizer takes of TRAIN's settings.

    Args:
        filling: changed.
        config: TRAIN.{BASE_LR, WEIGHT_DECAY, OPTIMIZER} are read.
        images: of a whole batch; learning rates are given for 512 of them.
    """
    name = filling.stated('/optimizer/type')
    if not isinstance(name, str):
        return
    takes = _arguments_of(name)
    lr = scale_lr(_option(config, 'TRAIN.BASE_LR'), images)
    settings = {
        'lr': ('TRAIN.BASE_LR', lr),
        'weight_decay': ('TRAIN.WEIGHT_DECAY', _option(config, 'TRAIN.WEIGHT_DECAY')),
        'betas': ('TRAIN.OPTIMIZER.BETAS', list(_option(config, 'TRAIN.OPTIMIZER.BETAS'))),
        'eps': ('TRAIN.OPTIMIZER.EPS', _option(config, 'TRAIN.OPTIMIZER.EPS')),
        'momentum': ('TRAIN.OPTIMIZER.MOMENTUM', _option(config, 'TRAIN.OPTIMIZER.MOMENTUM')),
    }
    for argument, (key, value) in settings.items():
        if argument in takes:
            words = f'{key} x {images} / 512' if argument == 'lr' else key
            _agree(filling, f'/optimizer/params/{argument}', config, key, value, words)


def fill_scheduler(filling: Filling, config: CfgNode, images: int) -> None:
    """Fills learning rates of /scheduler/params that are 'auto'.

    Raises:
        ConfigError: for a number of steps at 'auto': how many an epoch has is not known here.
    """
    base, warmup, least = (
        scale_lr(_option(config, f'TRAIN.{key}'), images)
        for key in ('BASE_LR', 'WARMUP_LR', 'MIN_LR')
    )
    settings = {
        'warmup_max_lr': (base, 'TRAIN.BASE_LR'),
        'warmup_min_lr': (warmup, 'TRAIN.WARMUP_LR'),
        'warmup_min_ratio': (warmup / base if base else 0.0, 'TRAIN.WARMUP_LR / BASE_LR'),
        'cos_min_ratio': (least / base if base else 0.0, 'TRAIN.MIN_LR / BASE_LR'),
    }
    for pointer in filling.autos():
        section, _, argument = pointer.rpartition('/')
        if section != '/scheduler/params':
            continue
        if argument.endswith('_num_steps'):
            raise ConfigError(
                f"{pointer} is 'auto', and only the data tell how many updates an epoch has: "
                'give the number'
            )
        if argument in settings:
            value, origin = settings[argument]
            filling.put(
                pointer, value, origin if 'ratio' in argument else f'{origin} x {images} / 512'
            )


def _agree(
    filling: Filling, pointer: str, config: CfgNode, key: str, value: Any, words: str
) -> None:
    """Fills one value that both files may state; where both do, they must state the same."""
    stated = filling.stated(pointer)
    changed = _option(config, key) != default_of(key)
    if stated is not None and changed and not _same(stated, value):
        raise ConfigError(
            f'{pointer} is {stated} in the ds_config, but {words} is {value}; make them agree, '
            "or set the JSON's to 'auto'"
        )
    filling.fill(pointer, value, words)


def _same(stated: Any, value: Any) -> bool:
    """Equal, but for what rounding does to a learning rate."""
    numbers = [list(v) if isinstance(v, list | tuple) else [v] for v in (stated, value)]
    try:
        return len(numbers[0]) == len(numbers[1]) and all(map(math.isclose, *numbers))
    except TypeError:  # one of them is no number
        return False


def _option(config: CfgNode, key: str) -> Any:
    return get_option(config, key, default_of(key))


def _arguments_of(optimizer: str) -> set[str]:
    """What the optimizer that DeepSpeed makes of a name takes."""
    import torch

    known = {'adam': 'Adam', 'adamw': 'AdamW', 'lamb': 'Adam', 'adagrad': 'Adagrad'}
    name = known.get(optimizer.lower(), optimizer)
    if optimizer.lower() == 'lion':
        return {'lr', 'betas', 'weight_decay'}
    made = getattr(torch.optim, name, None)
    return set(inspect.signature(made).parameters) if inspect.isclass(made) else set()


def _zero_default(key: str) -> Any:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    return next(f.default for n, f in fields.items() if key in (n, f.alias))


def _leaves(node: Any, pointer: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and (node or pointer == ''):
        for key, value in node.items():
            yield from _leaves(value, f'{pointer}/{key}')
    else:
        yield pointer, node
