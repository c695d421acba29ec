"""The search space: axes of labelled choices, each a piece of a ds_config and settings. Pure.

A space can be given as JSON:

    {
      "axes": {
        "stage": {
          "1": {"ds_config": {"zero_optimization": {"stage": 1}}},
          "3": {"ds_config": {"zero_optimization": {"stage": 3}}}
        },
        "batch": {
          "8x2": {"micro_batch": 8, "accumulation": 2},
          "16x1": {"micro_batch": 16, "accumulation": 1}
        },
        "prefetch": {
          "default": {},
          "more": {"ds_config": {"zero_optimization": {"stage3_prefetch_bucket_size": 200000000}}}
        },
        "fused": {"no": {}, "yes": {"opts": {"MODEL.KWARGS": {"fused_attn": true}}}}
      },
      "only": {"prefetch": {"stage": ["3"]}}
    }

A trial takes one choice of every axis; "only" leaves an axis out unless an axis before it has one
of the labels given. The "ds_config" pieces are merged over the ds_config that tuning starts from;
null removes a key, and where a piece states the ZeRO stage, that section starts empty. The "opts"
are keys of the yacs configuration. "micro_batch" and "accumulation" set both files' batch settings;
they have to keep micro-batch x accumulation as it is configured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internvl_ds.config.ds.pairs import ACCUMULATION, BATCH, MICRO_BATCH
from internvl_ds.errors import ConfigError
from internvl_ds.files.reading import read_json

Labels = Mapping[str, str]

_CHOICE_KEYS = {'ds_config', 'opts', 'micro_batch', 'accumulation'}

_BATCH = {'micro_batch': MICRO_BATCH, 'accumulation': ACCUMULATION}


@dataclass(frozen=True)
class Choice:
    """A piece of a configuration."""

    # merged over the ds_config; None as a value removes a key
    ds_config: Mapping[str, Any] = field(default_factory=dict)
    opts: Mapping[str, Any] = field(default_factory=dict)  # yacs key -> value


@dataclass(frozen=True)
class SearchSpace:
    """The configurations that can be tried."""

    # name -> label -> choice, in the order in which they are merged
    axes: Mapping[str, Mapping[str, Choice]]
    # name of an axis -> name of an earlier one -> the labels of that one with which it counts
    only: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)

    def active(self, axis: str, labels: Labels) -> bool:
        """Whether an axis counts, given the labels of the axes before it."""
        conditions = self.only.get(axis, {})
        return all(labels.get(other) in allowed for other, allowed in conditions.items())

    def combinations(self) -> Iterator[dict[str, str]]:
        """Every combination of labels, each once."""

        def extend(labels: dict[str, str], axes: list[str]) -> Iterator[dict[str, str]]:
            if not axes:
                yield labels
            elif not self.active(axes[0], labels):
                yield from extend(labels, axes[1:])
            else:
                for label in self.axes[axes[0]]:
                    yield from extend({**labels, axes[0]: label}, axes[1:])

        return extend({}, list(self.axes))

    def build(self, base: Mapping[str, Any], labels: Labels) -> tuple[dict[str, Any], dict]:
        """The ds_config, over ``base``, and the yacs settings that these labels stand for."""
        tree, opts = copy.deepcopy(dict(base)), dict[str, Any]()
        choices = [self.axes[axis][label] for axis, label in labels.items()]
        if any('stage' in c.ds_config.get('zero_optimization', {}) for c in choices):
            # Keys for one stage are none for another: where the space says which, it says all.
            tree.pop('zero_optimization', None)
        for choice in choices:
            tree = merged(tree, choice.ds_config)
            opts.update(choice.opts)
        return tree, opts


def merged(tree: Any, patch: Any) -> Any:
    """``patch`` over ``tree``, section by section (RFC 7386); neither is changed."""
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    result = dict(tree) if isinstance(tree, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def batch_choice(micro_batch: int, accumulation: int) -> Choice:
    """This micro-batch (images on a rank) and accumulation, in both files' words."""
    values = ((MICRO_BATCH, micro_batch), (ACCUMULATION, accumulation))
    return Choice({p.key: value for p, value in values}, {p.yacs: value for p, value in values})


def batch_pairs(images: int, even: bool = False) -> list[tuple[int, int]]:
    """Pairs (micro-batch, accumulation) whose product is ``images``, the largest micro-batch first.

    Each micro-batch is at most half of the one before, and even where mixup needs that.
    """
    pairs: list[tuple[int, int]] = []
    for micro in range(images, 0, -1):
        usable = images % micro == 0 and not (even and micro % 2)
        if usable and (not pairs or 2 * micro <= pairs[-1][0]):
            pairs.append((micro, images // micro))
    return pairs


def default_space(
    images: int, ranks: int, *, even: bool = False, offload: bool = True, recompute: bool = True
) -> SearchSpace:
    """The space that is searched when none is given.

    Args:
        images: of a rank in one update; the global batch divided by the ranks.
        ranks: with one, there is nothing to communicate, and no stage to tell from another.
        even: whether mixup needs an even micro-batch.
        offload: whether there is a host memory beside the device's to offload to.
        recompute: whether the model can recompute activations.
    """
    stages = ['0', '1', '2', '3'] if ranks > 1 or offload else ['0']
    zero_stages = tuple(stage for stage in stages if stage != '0')
    axes: dict[str, dict[str, Choice]] = {
        'stage': {stage: _zero(stage=int(stage)) for stage in stages},
        'batch': {f'{m}x{a}': batch_choice(m, a) for m, a in batch_pairs(images, even)},
    }
    only: dict[str, dict[str, tuple[str, ...]]] = {}
    if ranks > 1:
        axes['bucket'] = {'default': Choice()} | {
            label: _zero(reduce_bucket_size=size, allgather_bucket_size=size)
            for label, size in (('50M', 50_000_000), ('5M', 5_000_000))
        }
        axes['overlap'] = {
            'default': Choice(),
            'on': _zero(overlap_comm=True),
            'off': _zero(overlap_comm=False),
        }
        only.update(bucket={'stage': zero_stages}, overlap={'stage': zero_stages})
    if offload:
        to_host = {'device': 'cpu', 'pin_memory': True}
        # So that torch's optimizers train too, and its AdamW where DeepSpeed's cannot be compiled.
        free = {'zero_force_ds_cpu_optimizer': False}
        optimizer = Choice({**free, 'zero_optimization': {'offload_optimizer': to_host}})
        both = merged(optimizer.ds_config, {'zero_optimization': {'offload_param': to_host}})
        axes['offload'] = {'none': Choice(), 'optimizer': optimizer}
        axes['offload3'] = {'none': Choice(), 'optimizer': optimizer, 'all': Choice(both)}
        only.update(offload={'stage': ('1', '2')}, offload3={'stage': ('3',)})
    if recompute:
        axes['recompute'] = {
            'no': Choice(opts={'TRAIN.USE_CHECKPOINT': False}),
            'yes': Choice(opts={'TRAIN.USE_CHECKPOINT': True}),
        }
    return SearchSpace(axes, only)


def read_space(path: Path) -> Any:
    """The content of a space's file, unchecked.

    Raises:
        ConfigError: when it cannot be read.
    """
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f'--space {path}: cannot be read as JSON: {error}') from error


def parse_space(tree: Any, images: int | None) -> SearchSpace:
    """Makes a space of its file's content; the module's docstring has the format.

    Args:
        tree: as `read_space` returned it.
        images: of a rank in one update, as configured; None while that is not known, and not
            checked.

    Raises:
        ConfigError: says what is wrong, and where in the file.
    """
    _is_object('', tree)
    _only_keys('', tree, {'axes', 'only'})
    axes: dict[str, dict[str, Choice]] = {}
    for axis, choices in _is_object('/axes', tree.get('axes')).items():
        where = f'/axes/{axis}'
        if not _is_object(where, choices):
            raise ConfigError(f'{where} has no choices')
        axes[axis] = {
            label: _parse_choice(f'{where}/{label}', choice, images)
            for label, choice in choices.items()
        }
    if not axes:
        raise ConfigError('/axes is empty: there is nothing to try')
    return SearchSpace(axes, _parse_only(tree.get('only', {}), axes))


def _zero(**values: Any) -> Choice:
    return Choice({'zero_optimization': values})


def _parse_choice(where: str, tree: Any, images: int | None) -> Choice:
    _is_object(where, tree)
    _only_keys(where, tree, _CHOICE_KEYS)
    ds_config = dict(_is_object(f'{where}/ds_config', tree.get('ds_config', {})))
    opts = dict(_is_object(f'{where}/opts', tree.get('opts', {})))
    for pair in _BATCH.values():
        if pair.key in ds_config or pair.yacs in opts:
            raise ConfigError(
                f'{where}: {pair.key if pair.key in ds_config else pair.yacs} is set by '
                '"micro_batch" and "accumulation", beside "ds_config" and "opts"'
            )
    if BATCH.key in ds_config:
        raise ConfigError(f'{where}/ds_config/train_batch_size: tuning keeps the global batch')
    if not _BATCH.keys() & tree.keys():
        return Choice(ds_config, opts)
    numbers = [tree.get(name) for name in _BATCH]
    for name, number in zip(_BATCH, numbers, strict=True):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ConfigError(f'{where}/{name} is {number!r}; both it and its counterpart are due')
    micro, accumulation = numbers
    if images is not None and micro * accumulation != images:
        raise ConfigError(
            f'{where}: micro_batch {micro} x accumulation {accumulation} is '
            f'{micro * accumulation}, and {images} images a rank and update are configured: the '
            'global batch has to stay'
        )
    batch = batch_choice(micro, accumulation)
    return Choice({**ds_config, **batch.ds_config}, {**opts, **batch.opts})


def _parse_only(tree: Any, axes: Mapping[str, Mapping]) -> dict[str, dict[str, tuple[str, ...]]]:
    order = list(axes)
    only: dict[str, dict[str, tuple[str, ...]]] = {}
    for axis, conditions in _is_object('/only', tree).items():
        if axis not in axes:
            raise ConfigError(f'/only/{axis}: there is no such axis; there are {", ".join(order)}')
        only[axis] = {}
        for other, labels in _is_object(f'/only/{axis}', conditions).items():
            where = f'/only/{axis}/{other}'
            if other not in order[: order.index(axis)]:
                raise ConfigError(f'{where}: it has to be an axis that comes before {axis}')
            if not isinstance(labels, list) or not labels or set(labels) - set(axes[other]):
                have = ', '.join(axes[other])
                raise ConfigError(f'{where} is {labels!r}; it has to be a list of {have}')
            only[axis][other] = tuple(labels)
    return only


def _is_object(where: str, tree: Any) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping):
        raise ConfigError(f'{where or "the file"} holds {tree!r}, where an object belongs')
    return tree


def _only_keys(where: str, tree: Mapping[str, Any], keys: set[str]) -> None:
    if unknown := sorted(set(tree) - keys):
        have = ', '.join(sorted(keys))
        raise ConfigError(f'{where}/{unknown[0]}: unknown key; {have} can be given')
