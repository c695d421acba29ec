"""Finds what an optimizer keeps for a tensor, and does to it, by steps of a copy on a new one."""

from __future__ import annotations

import copy
import math
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from internvl_ds.zero.muon.routing import is_muon, route_of, routes_of
from internvl_ds.zero.passes.effect import ZeroEffect

# State of DeepSpeed's own that move each element by itself. They cannot be tried on a copy: that
# would end the original's.
_MOMENT = torch.empty(1)
OF_DEEPSPEED: dict[str, dict[str, Any]] = {
    'FusedAdam': {'exp_avg': _MOMENT, 'exp_avg_sq': _MOMENT, 'step': 0},
    'DeepSpeedCPUAdam': {'exp_avg': _MOMENT, 'exp_avg_sq': _MOMENT, 'step': 0},
    'FusedLion': {'exp_avg': _MOMENT, 'step': 0},
    'DeepSpeedCPULion': {'exp_avg': _MOMENT, 'step': 0},
    'DeepSpeedCPUAdagrad': {'exp_avg_sq': _MOMENT, 'step': 0},
}

# Which tensors a group holds, and what moves with the schedule: no settings of the optimizer.
NOT_SETTINGS = frozenset({'params', 'param_names', 'names', 'name', 'lr', 'initial_lr', 'lr_scale'})

# Elements of the largest tensor that is tried in its own shape, and updates after which no key is
# new any more: timm's Lookahead has one after its sixth.
_LARGEST, _SMALL, _UPDATES = 1 << 20, (3,), 32
# What a Muon keeps of a matrix does not depend on its shape, and flat parts have none to try.
_MATRIX = (4, 4)

# Of an optimizer, by settings: asked for in each update that leaves parameters out.
_effects: weakref.WeakKeyDictionary[Any, dict[Any, ZeroEffect]] = weakref.WeakKeyDictionary()

# What a value of a state is: a number, a tensor of the parameter's own shape, of one that does not
# matter, or of another; or else the name of its type.
Form = tuple[int, ...] | str
NUMBER, ELEMENTS, TENSOR = 'number', 'elements', 'tensor'


class Kept(NamedTuple):
    """The state that an optimizer keeps for a tensor of one group.

    Attributes:
        forms: key -> its form, after the first update.
        numbers: key -> a number of it, for its type.
        exact: whether the tensor was tried in its own shape; else a shape's dimensions count only.
        late: keys that come with a later update only.
        counters: entries of the group that updates change, such as the ``step`` of timm's Lamb ->
            their value after some.
    """

    forms: Mapping[str, Form]
    numbers: Mapping[str, Any]
    exact: bool
    late: frozenset[str] = frozenset()
    counters: Mapping[str, Any] = {}


def state_of_optimizer(optimizer: Any) -> Any:
    """Tensor -> its state; inside timm's Lookahead, of the inner optimizer."""
    return getattr(optimizer, '_base_optimizer', optimizer).state


def texts_of(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The settings of a parameter group as a key of what trials with them have shown."""
    return tuple(sorted((key, repr(settings[key])) for key in settings.keys() - NOT_SETTINGS))


def form_of(value: Any, shape: Sequence[int] | None = None) -> Form:
    """The form of a value (number, tensor, `Flat` or other) that an optimizer keeps for a tensor.

    ``shape`` is the shape of that tensor; None where shapes do not matter.
    """
    if isinstance(value, int | float):
        return NUMBER
    dims = getattr(value, 'shape', None)
    if dims is None:
        return type(value).__name__
    if not len(dims):
        return NUMBER
    if shape is None:
        return TENSOR
    return ELEMENTS if tuple(dims) == tuple(shape) else tuple(dims)


def forms_of(state: Mapping[str, Any], shape: Sequence[int] | None = None) -> dict[str, Form]:
    """The forms of a tensor's state, without values of None. See `form_of`."""
    return {key: form_of(value, shape) for key, value in state.items() if value is not None}


def like(value: Any, other: Any) -> Any:
    """A copy of a value; a number in the form of another: a tensor as it is, an int or a float."""
    if form_of(value) != NUMBER:
        return copy.deepcopy(value)
    if isinstance(other, int | float):
        return type(other)(value)
    dtype, device = (other.dtype, other.device) if torch.is_tensor(other) else (torch.float32, None)
    return torch.tensor(float(value), dtype=dtype, device=device)


class Trials:
    """The state that the running optimizer keeps, by group. Reading changes nothing."""

    def __init__(self, optimizer: Any) -> None:
        """Takes the optimizer of the client, or of DeepSpeed."""
        self.optimizer = optimizer
        self._results: dict[Any, Kept | None] = {}

    def kept(self, settings: Mapping[str, Any], tensor: torch.Tensor) -> Kept | None:
        """The state that the optimizer keeps for a tensor of a group; None if not known.

        Of the tensor only shape, dtype and device matter.
        """
        if type(self.optimizer).__module__.startswith('deepspeed.'):
            state = OF_DEEPSPEED.get(type(self.optimizer).__name__)
            return None if state is None else Kept(forms_of(state, (1,)), state, True)
        small: tuple[int, ...] = _SMALL
        if is_muon(self.optimizer) and route_of(self.optimizer, settings):
            small, tensor = _MATRIX, tensor.new_empty(_MATRIX)
        at_end = self._after(_UPDATES, settings, tensor, small)
        if at_end is None:
            return None
        # What it has counted so far does not count: the copy begins anew.
        defaults, counters = self.optimizer.defaults, at_end.counters
        fresh = {k: v for k, v in settings.items() if k not in counters}
        fresh.update({key: defaults[key] for key in counters if key in defaults})
        shape = _trial_shape(tensor.shape)
        first = self._after(1, fresh, tensor, shape)
        early = self._after(1, fresh, tensor, small)
        later = self._after(_UPDATES, fresh, tensor, small)
        if first is None or early is None or later is None:
            return None
        late = frozenset(later.forms.keys() - early.forms.keys())
        return Kept(first.forms, first.numbers, shape == tensor.shape, late, counters)

    def _after(
        self, updates: int, settings: Mapping[str, Any], tensor: torch.Tensor, shape: Sequence[int]
    ) -> Kept | None:
        """The state that a copy keeps for a blank tensor after updates; None if it cannot step."""
        key = (updates, texts_of(settings), shape, tensor.dtype, tensor.device)
        if key not in self._results:
            blank = torch.ones(shape, dtype=tensor.dtype, device=tensor.device)
            with apart(tensor.device):
                try:
                    self._results[key] = _keeps_after(self.optimizer, settings, blank, updates)
                except Exception:  # it needs a closure, or more than its class says
                    self._results[key] = None
        return self._results[key]


def _trial_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape, its long sides cut where the tensor would be too large to try."""
    if math.prod(shape) <= _LARGEST:
        return tuple(shape)
    side = int(_LARGEST ** (1 / len(shape)))
    return tuple(min(n, side) for n in shape)


def _keeps_after(
    optimizer: Any, settings: Mapping[str, Any], blank: torch.Tensor, updates: int
) -> Kept:
    """The state that a copy keeps for a new parameter after updates."""
    parameter = nn.Parameter(blank)
    trial, group = _trial_of(optimizer, settings, parameter)
    for _ in range(updates):
        parameter.grad = torch.ones_like(parameter)
        type(optimizer).step(trial)
    state = state_of_optimizer(trial)[parameter]
    forms = forms_of(state, parameter.shape)
    numbers = {key: state[key] for key, form in forms.items() if form == NUMBER}
    entries = group.keys() - NOT_SETTINGS
    counters = {k: group[k] for k in entries if repr(group[k]) != repr(settings.get(k))}
    return Kept(forms, numbers, True, frozenset(), counters)


def effect_of_zeros(optimizer: Any, settings: Mapping[str, Any]) -> ZeroEffect:
    """What gradients of zero do in place of none, with the settings of a group; by trial.

    DeepSpeed's own cannot be tried; where a trial fails the effect is taken to be another.
    """
    if type(optimizer).__module__.startswith('deepspeed.'):
        return ZeroEffect(not settings.get('weight_decay', 0.0), late=False, at_times=False)
    # timm's Lookahead does something in every k-th update, here not where gradients begin or end.
    every = int(settings.get('lookahead_k', 1))
    run = every * max(1, 8 // every) + 1
    if 'lookahead_step' in settings:
        settings = {**settings, 'lookahead_step': 0}
    effects = _effects.setdefault(optimizer, {})
    key = run, _sorts_of(settings)
    if key not in effects:
        none, one = [None] * run, [1.0] * run
        rare = [*one, *none, *one, *none, None, 1.0, None, 1.0, *one]
        same = (_zeros_are_none(optimizer, settings, turns) for turns in (none, none + one, rare))
        effects[key] = ZeroEffect(*same)
    return effects[key]


def _sorts_of(settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The settings of a parameter group without the sizes of numbers.

    A schedule or a count of updates changes these in every update.
    """
    names = sorted(settings.keys() - NOT_SETTINGS)
    return tuple((name, _sort_of(settings[name])) for name in names)


def _sort_of(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_sort_of, value))
    if isinstance(value, bool) or form_of(value) != NUMBER:
        return repr(value)
    return float(value) if float(value) in (0.0, 1.0) else NUMBER


def _zeros_are_none(
    optimizer: Any, settings: Mapping[str, Any], gradients: Sequence[float | None]
) -> bool:
    # In float32 a small weight decay is lost beside a weight of 1.
    for dtype in (torch.float64, torch.float32):
        try:
            return all(
                torch.equal(*(_moved(optimizer, g, gradients, empty, dtype) for empty in (None, 0)))
                for g in ({**settings, **route} for route in routes_of(optimizer, settings))
            )
        except Exception:  # it needs a closure, say, or another dtype
            continue
    return False


def _moved(
    optimizer: Any,
    settings: Mapping[str, Any],
    gradients: Sequence[float | None],
    empty: float | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A new weight after each update of a copy; ``empty`` stands for gradients of None."""
    shape = _MATRIX if is_muon(optimizer) and route_of(optimizer, settings) else _SMALL
    device = next((p.device for p in settings['params']), torch.device('cpu'))
    parameter = nn.Parameter(torch.ones(shape, dtype=dtype, device=device))
    weights = []  # at the end alone, momentum may have come to the same
    with apart(device):
        trial, _ = _trial_of(optimizer, {**settings, 'lr': 0.01}, parameter)
        for gradient in gradients:
            value = empty if gradient is None else gradient
            parameter.grad = None if value is None else torch.full_like(parameter, value)
            type(optimizer).step(trial)
            weights.append(parameter.detach().clone())
    return torch.stack(weights)


def starts_with_zeros(optimizer: Any, settings: Mapping[str, Any]) -> bool:
    """Whether all tensors that the optimizer keeps for a parameter are zero before its first step.

    By trial, with gradients of zero; False where that fails.
    """
    if type(optimizer).__module__.startswith('deepspeed.'):
        return type(optimizer).__name__ in OF_DEEPSPEED
    parameter = nn.Parameter(torch.ones(_SMALL))
    try:
        with apart(parameter.device):
            trial, _ = _trial_of(optimizer, settings, parameter)
            parameter.grad = torch.zeros_like(parameter)
            type(optimizer).step(trial)
    except Exception:
        return False
    values = state_of_optimizer(trial)[parameter].values()
    return not any(v.any() for v in values if form_of(v, _SMALL) == ELEMENTS)


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Around a trial: it draws none of the program's random numbers, and is not compiled."""
    devices = [] if device.type == 'cpu' else [device]
    with (
        torch.random.fork_rng(devices, device_type=device.type if devices else 'cuda'),
        torch.compiler.set_stance('force_eager'),
    ):
        yield


def _trial_of(
    optimizer: Any, settings: Mapping[str, Any], parameter: nn.Parameter
) -> tuple[Any, dict[str, Any]]:
    """A copy of an optimizer for a new parameter, and its only group."""
    memo: dict[int, Any] = {id(p): parameter for g in optimizer.param_groups for p in g['params']}
    group = copy.deepcopy({key: value for key, value in settings.items() if key != 'params'}, memo)
    group['params'] = [parameter]
    return copy_of(optimizer, [group], memo), group


def copy_of(optimizer: Any, groups: list[dict[str, Any]], memo: dict[int, Any]) -> Any:
    """A copy of an optimizer for other groups, which shares nothing that a step could change.

    Args:
        optimizer: stays as it is.
        groups: of the copy, parameters included.
        memo: as of `copy.deepcopy`: the id of a parameter -> what stands for it in the copy.
    """
    trial: Any = object.__new__(type(optimizer))
    memo[id(optimizer)] = trial
    for name, value in vars(optimizer).items():
        if name.endswith('_hooks'):
            trial.__dict__[name] = OrderedDict()
        elif isinstance(value, torch.optim.Optimizer):
            trial.__dict__[name] = copy_of(value, groups, memo)
        elif isinstance(value, nn.Module):
            trial.__dict__[name] = value
        elif name not in ('state', 'param_groups', 'step'):  # a scheduler puts a step there
            trial.__dict__[name] = copy.deepcopy(value, memo)
    trial.state, trial.param_groups = defaultdict(dict), groups
    return trial
