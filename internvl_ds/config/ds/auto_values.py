"""Fills what a ds_config leaves open ('auto', or absent) from the yacs config and the model."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

from yacs.config import CfgNode

from internvl_ds.config.ds.diagnostics import Diagnostic, diagnostic
from internvl_ds.config.ds.pairs import ARGUMENT, AUTO, BATCH, PAIRS
from internvl_ds.config.tree import default_of, get_option, scale_lr, value_at

DEFAULT = "DeepSpeed's default"
_FILE = 'the ds_config'
_ZERO = '/zero_optimization'
_REDUCE_BUCKET = f'{_ZERO}/reduce_bucket_size'
_REDUCE_BUCKET_MOST = 500_000_000  # elements: DeepSpeed's default

# Sizes in elements that may stand at 'auto' until there is a model.
_BUCKETS = (
    _REDUCE_BUCKET,
    f'{_ZERO}/allgather_bucket_size',
    f'{_ZERO}/stage3_prefetch_bucket_size',
    f'{_ZERO}/stage3_param_persistence_threshold',
)


class Filling:
    """A ds_config that is being resolved.

    Attributes:
        tree: a copy of the ds_config, changed by `put` and `fill`.
        origins: JSON pointer of each value -> where the value comes from, in a few words.
        findings: what contradicts the yacs config, or stays open.
    """

    def __init__(
        self, ds_config: Mapping[str, Any], origins: Mapping[str, str] | None = None
    ) -> None:
        self.tree: dict[str, Any] = copy.deepcopy(dict(ds_config))
        self.origins = dict(origins or {pointer: _FILE for pointer, _ in _leaves(self.tree)})
        self.findings: list[Diagnostic] = []

    def value_of(self, pointer: str) -> Any:
        """The value at a JSON pointer; None where it is absent or 'auto'."""
        value = value_at(self.tree, *pointer.split('/')[1:])
        return None if value == 'auto' else value

    def put(self, pointer: str, value: Any, origin: str) -> None:
        """Sets a value; its origin stays the file if the file states the same."""
        if self.value_of(pointer) != value:
            self.origins[pointer] = origin
        *sections, last = pointer.split('/')[1:]
        node = self.tree
        for key in sections:
            node = node.setdefault(key, {})
        node[last] = value

    def fill(self, pointer: str, value: Any, origin: str) -> None:
        """Sets a value where none is stated."""
        if self.value_of(pointer) is None:
            self.put(pointer, value, origin)

    def refuse(self, pointer: str, message: str) -> None:
        """Notes an error."""
        self.findings.append(diagnostic(pointer, message))

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
        pointers = set(filling.autos()) & set(_BUCKETS)
        filling.origins.update(dict.fromkeys(pointers, 'the model, once there is one'))
        return
    stage = filling.value_of(f'{_ZERO}/stage')
    if stage in (1, 2, 3):
        size = reduce_bucket_of(trained)
        filling.fill(_REDUCE_BUCKET, size, f'the model: {trained} trained elements, at most 5e8')
    for pointer in filling.autos():
        if pointer in _BUCKETS:
            filling.put(pointer, default_at(pointer), DEFAULT)


def fill_open_values(filling: Filling, config: CfgNode, trained: int | None) -> None:
    """Fills open values after the batch sizes; refuses each 'auto' that nothing fills."""
    images = filling.value_of(BATCH.pointer)
    _fill_optimizer(filling, config, images)
    _fill_scheduler(filling, config, images)
    fill_buckets(filling, trained)
    origin = "internvl_ds: timm's optimizers and SGD are meant under ZeRO"
    filling.fill('/zero_allow_untested_optimizer', True, origin)
    if not value_at(filling.tree, 'timers', 'throughput'):
        origin = 'internvl_ds: for a rate of its own DeepSpeed waits for the device in each pass'
        filling.fill('/timers/throughput/enabled', False, origin)
    skips = {*_BUCKETS, *(finding.pointer for finding in filling.findings)}
    for pointer in filling.autos():
        if pointer not in skips and default_at(pointer) != 'auto':  # DeepSpeed reads some itself
            filling.refuse(
                pointer,
                "'auto' has no counterpart in the yacs config; give a value, or leave the key out "
                "for DeepSpeed's default",
            )


def _fill_optimizer(filling: Filling, config: CfgNode, images: int) -> None:
    """Fills /optimizer/params with the settings of TRAIN that the optimizer takes.

    Where both files state a value, they must state the same.
    """
    name = filling.value_of('/optimizer/type')
    arguments = _arguments_of(name) if isinstance(name, str) else ()
    for pair in PAIRS:
        if pair.rule != ARGUMENT or pair.key not in arguments:
            continue
        value, entry = get_option(config, pair.yacs), filling.value_of(pair.pointer)
        is_set = value != default_of(pair.yacs)
        if pair.key == 'lr':
            value = scale_lr(value, images)
        elif isinstance(value, tuple):
            value = list(value)
        origin = pair.origin(images)
        if entry is not None and is_set and not _same(entry, value):
            filling.refuse(
                pair.pointer,
                f'{pair.pointer} is {entry} in the ds_config, but {origin} is {value}; make them '
                "agree, or set the JSON's to 'auto'",
            )
        filling.fill(pair.pointer, value, origin)


def _fill_scheduler(filling: Filling, config: CfgNode, images: int) -> None:
    """Fills learning rates of /scheduler/params that are 'auto'; numbers of steps are refused."""
    pairs = {pair.pointer: pair for pair in PAIRS if pair.rule == AUTO}
    base = scale_lr(get_option(config, 'TRAIN.BASE_LR'), images)
    for pointer in filling.autos():
        if pointer.startswith('/scheduler/params/') and pointer.endswith('_num_steps'):
            filling.refuse(
                pointer,
                f"{pointer} is 'auto', and only the data tell how many updates an epoch has: "
                'give the number',
            )
        elif pair := pairs.get(pointer):
            value = scale_lr(get_option(config, pair.yacs), images)
            if pointer.endswith('_ratio'):
                value = value / base if base else 0.0
            filling.put(pointer, value, pair.origin(images))


def _same(entry: Any, value: Any) -> bool:
    """Whether two learning rates are equal but for rounding."""
    numbers = [list(v) if isinstance(v, list | tuple) else [v] for v in (entry, value)]
    try:
        return len(numbers[0]) == len(numbers[1]) and all(map(math.isclose, *numbers))
    except TypeError:  # one of them is no number
        return False


def _arguments_of(name: str) -> set[str]:
    """The arguments of the optimizer class that DeepSpeed makes for a name."""
    import torch

    torch_names = {'adam': 'Adam', 'adamw': 'AdamW', 'lamb': 'Adam', 'adagrad': 'Adagrad'}
    if name.lower() == 'lion':
        return {'lr', 'betas', 'weight_decay'}
    optimizer = getattr(torch.optim, torch_names.get(name.lower(), name), None)
    return set(inspect.signature(optimizer).parameters) if inspect.isclass(optimizer) else set()


def default_at(pointer: str) -> Any:
    """DeepSpeed's default of a key; None where it is not known."""
    from internvl_ds.config.ds.schema import find, installed  # DeepSpeed with it

    key = find(installed(), pointer.split('/')[1:])
    return key.default if key else None


def _leaves(node: Any, pointer: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and (node or pointer == ''):
        for key, value in node.items():
            yield from _leaves(value, f'{pointer}/{key}')
    else:
        yield pointer, node
